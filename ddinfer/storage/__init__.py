"""What is on disk. Imports neither torch nor diffusers."""
