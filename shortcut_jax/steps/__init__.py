"""Floor 3a: pure composition, jittable, without disk. Imports core and models."""
