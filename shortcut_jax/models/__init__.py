"""Networks in Flax (linen), their presets and fresh weights."""
