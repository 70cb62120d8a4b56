"""Who does what: the world, its process group, its launcher. Knows nothing of diffusion."""
