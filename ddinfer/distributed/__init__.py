"""Ranks: the world, the launcher, the process group, the split of the work. No diffusion."""
