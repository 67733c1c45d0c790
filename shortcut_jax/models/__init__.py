"""Floor 2: Flax (linen) definitions and their presets. Imports core only."""
