"""How one process holds a model: loading it, placing it, carrying the placement out."""
