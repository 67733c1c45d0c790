"""Numbers and texts that no field of a config can hold: not finite, beyond what devices count to, no names of files."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from shortcut_jax.core.local_path import local_path
from shortcut_jax.errors import ConfigError

SEEDS = ("seed", "validation.seed", "eval.seeds")
"""Below 2^32: JAX takes a seed modulo that."""

COUNTED_HERE = ("mesh.min_shard", "validation.every_samples", "data.limit")
"""Whole numbers that only Python compares; all others are below 2^31, which is what steps and rows are counted in."""

NAMES_OF_SETS = ("data.name", "data.mix", "validation.name")


def check_values(values: Mapping[str, Any]) -> None:
    """Checks all fields of a config, by dotted name.

    Raises:
      ConfigError: a number is not finite or too large, or a text has a character that no text of a config has.
      PathError: the name of a set is no name of a folder.
    """
    for name, value in values.items():
        for one in _leaves(value):
            if isinstance(one, float) and not math.isfinite(one):
                raise ConfigError(f"{name} is {value}, but must be finite")
            if isinstance(one, int):
                _check_size(name, one)
            if isinstance(one, str) and "\0" in one:
                raise ConfigError(f"{name} is {one[:80]!r}, which has a NUL character: remove it")
    for name in NAMES_OF_SETS:
        for one in _leaves(values[name]):
            local_path(one, name)


def _check_size(name: str, value: int) -> None:
    bits = 32 if name in SEEDS else 63 if name in COUNTED_HERE else 31
    if abs(value) >= 2**bits:
        digits = str(value) if abs(value) < 10**30 else "a number of more than 30 digits"
        raise ConfigError(f"{name} is {digits}, but must be less than 2^{bits} = {2**bits}")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        yield from value
    elif value is not None:
        yield value
