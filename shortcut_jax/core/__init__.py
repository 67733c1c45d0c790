"""Floor 1: pure mathematics. Imports nothing of this package."""
