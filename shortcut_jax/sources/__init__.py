"""Whatever holds weights, opened alike."""
