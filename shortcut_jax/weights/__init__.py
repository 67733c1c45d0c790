"""PyTorch names and ours: tables, read in both directions."""
