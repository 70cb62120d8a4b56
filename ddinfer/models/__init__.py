"""How one process holds a model: its repository, loading, placement (pure), dispatch."""
