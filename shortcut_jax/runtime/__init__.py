"""Floor 3b: devices and disk. Imports core, models and weights."""
