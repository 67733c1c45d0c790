"""JSON objects in files and headers of checkpoints."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

from shortcut_jax.errors import ConversionError
from shortcut_jax.weights.entries import FLAG, LIST, NUMBER, WHOLE, told

_MOST, _MOST_BLOCKS, _MOST_ENTRIES = 10**7, 512, 16
"""Bounds of whole numbers, of numbers of blocks, and of lists in records: what is beyond would take all memory."""


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises ConversionError where it is none."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConversionError(f"{file} is not JSON: {error}") from error
    except OSError as error:
        raise ConversionError(f"{file} cannot be read: {error.strerror}") from error
    return parse_json(text, str(file))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """A JSON object. Raises ConversionError, which names `where`, if the text is none."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ConversionError(f"{where} is not JSON that can be read: it is nested too deeply") from error
    except ValueError as error:
        raise ConversionError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{where} is not a JSON object")
    return value


def build(cls: type[Any], values: Any, where: str, least: int = 1) -> Any:
    """A dataclass of numbers, flags, texts and lists of whole numbers from a JSON object.

    Args:
      cls: the dataclass.
      values: of some or all of its fields; the others are at their defaults.
      where: what the errors call the object.
      least: of whole numbers.

    Raises:
      ConversionError: no object, an unknown or missing entry, one of another type, or a number out of bounds.
    """
    if not isinstance(values, dict):
        raise ConversionError(f"{where} is not a JSON object")
    fields: dict[str, Any] = {f.name: f for f in dataclasses.fields(cls)}
    needed = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    for what, names in (("unknown", values.keys() - fields.keys()), ("missing", needed - values.keys())):
        if names:
            raise ConversionError(f"{where} has {what} entries: {', '.join(sorted(names))[:200]}")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _entry(values, name, hints[name], where, least) for name in values})


def _entry(values: dict[str, Any], name: str, hint: Any, where: str, least: int) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if values[name] is None and type(None) in options:
        return None
    kinds = {bool: FLAG, int: WHOLE, float: NUMBER, tuple: LIST}
    kind = next((kinds[t] for t in (typing.get_origin(o) or o for o in options) if t in kinds), None)
    if kind is None:
        if str not in options or not isinstance(values[name], str):
            raise ConversionError(f"{where} says {name} {str(values[name])[:40]!r}, which cannot be read")
        return values[name]
    value = told(values, name, kind, where=where)
    if kind in (WHOLE, LIST):
        numbers, most = (value, _MOST) if kind == LIST else ((value,), _MOST_BLOCKS if "blocks" in name else _MOST)
        lowest = 0 if kind == LIST or len(options) > 1 else least
        if len(numbers) > _MOST_ENTRIES or not all(lowest <= n <= most for n in numbers):
            raise ConversionError(f"{where} says {name} {str(values[name])[:40]}, which is out of range")
    return value
