"""Devices and disk: sharding, checkpoints, metrics, XLA."""
