"""How ranks hold one model together: cutting it into stages, running them as a pipeline."""
