"""Floor 3b: records and the input pipeline. Imports core."""
