"""Entries of configs that others wrote, read by their kind: what is of another one is named, not passed on."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from shortcut_jax.errors import ConversionError

WHOLE, NUMBER, FLAG, LIST = "a whole number", "a number", "true or false", "a list of whole numbers"
"""What an entry may have to be."""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_KINDS: dict[str, Callable[[Any], bool]] = {
    WHOLE: _is_whole,
    NUMBER: lambda v: _is_whole(v) or (isinstance(v, float) and math.isfinite(v)),
    FLAG: lambda v: isinstance(v, bool),
    LIST: lambda v: isinstance(v, list | tuple) and all(map(_is_whole, v)),
}


def told(values: Mapping[str, Any], name: str, kind: str, default: Any = None, where: str = "config.json") -> Any:
    """An entry of a config, lists as tuples; `default` where it is absent.

    Raises:
      ConversionError: it is not of its kind, one of those above; the message names `where`.
    """
    if name not in values:
        return default
    value = values[name]
    if not _KINDS[kind](value):
        raise ConversionError(f"{where} says {name} {repr(value)[:80]}, which is not {kind}")
    return tuple(value) if kind == LIST else value
