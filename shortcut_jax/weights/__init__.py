"""Floor 2: PyTorch <-> Flax name tables, both directions. Imports core only."""
