"""TFDS builders of the sets that need no download: they are made on first use from what the machine has."""

import importlib
from typing import Any

EMBEDDED = ("digits", "glyphs")
"""Their names, which are those of their modules."""


def register(name: str) -> Any:
    """Imports the builder of a set, which TFDS then knows; returns its module."""
    return importlib.import_module(f"shortcut_jax.data.datasets.{name}")


def captions(name: str) -> tuple[str, ...]:
    """All captions of a set, in the order of its classes."""
    captions: tuple[str, ...] = register(name).CAPTIONS
    return captions
