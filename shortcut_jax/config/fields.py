"""The fields of a config by their dotted names: types, help, and values given as text on a command line."""

import ast
import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

TRUE, FALSE, NONE = ("true", "t", "1"), ("false", "f", "0"), ("", "none")


class FieldError(ValueError):
    """Text that is no value of a field; the message says what would be."""


def field_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Type hints of the fields of nested dataclasses, by dotted name."""
    hints: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        nested = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        hints |= field_types(hint, f"{prefix}{name}.") if nested else {prefix + name: hint}
    return hints


def split_hint(hint: Any) -> tuple[Any, bool]:
    """A type without its None, and whether it may be None."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next(o for o in options if o is not types.NoneType), types.NoneType in options


def describe(hint: Any) -> str:
    """A type in words: `int`, `tuple of float`, `str or None`."""
    kind, optional = split_hint(hint)
    several = typing.get_origin(kind) is tuple
    text = f"tuple of {typing.get_args(kind)[0].__name__}" if several else kind.__name__
    return f"{text} or None" if optional else text


def unknown(name: str, known: Sequence[str]) -> str:
    """What to say of a name that is no field: the names that it may stand for, or what is known beside it."""
    beneath = [k for k in known if k.startswith(f"{name}.")]
    if beneath:
        return f"{name!r} is a group of config keys: set one of {', '.join(beneath)}"
    group, _, leaf = name.rpartition(".")
    leaves = difflib.get_close_matches(leaf, {k.rpartition(".")[2]: k for k in known}, 3, 0.7)
    close = sorted((k for k in known if k.rpartition(".")[2] in leaves), key=lambda k: k.rpartition(".")[0] != group)
    if close:
        return f"unknown config key {name!r}: did you mean {' or '.join(close[:3])}?"
    beside = [k for k in known if k.rpartition(".")[0] == group] or [k for k in known if "." not in k]
    return f"unknown config key {name!r}; known here: {', '.join(beside)}"


def parse_text(text: str, hint: Any) -> Any:
    """The value that a text means for a field: `None` or nothing unsets an optional one and empties a tuple.

    Tuples are written `1,2`, `(1,2)` or `[1,2]`; texts in them that hold commas are quoted: `('a, b', 'c')`.

    Raises:
      FieldError: it is no value of that type.
    """
    kind, optional = split_hint(hint)
    unset = text.strip().lower() in NONE
    if optional and unset:
        return None
    try:
        if typing.get_origin(kind) is tuple:
            return () if unset else tuple(_elements(text.strip(), typing.get_args(kind)[0]))
        return _scalar(text, kind)
    except (ValueError, OverflowError) as error:
        reason = f": {error}" if isinstance(error, FieldError) else ""
        raise FieldError(f"is {_shown(text)}, but must be {describe(hint)}{reason}") from None


def _scalar(text: str, kind: type) -> Any:
    if kind is str:
        return text
    if kind is bool:
        return _boolean(text.strip().lower())
    if kind is float:
        return float(text)
    try:
        return int(text)
    except ValueError:
        number = float(text)  # such as 1e3
        if number != int(number):
            raise
        return int(number)


def _boolean(text: str) -> bool:
    if text not in (*TRUE, *FALSE):
        raise ValueError(text)
    return text in TRUE


def _elements(text: str, kind: type) -> list[Any]:
    if kind is str and (quoted := _quoted(text)) is not None:
        return quoted
    if text[0] + text[-1] in ("()", "[]"):
        text = text[1:-1]
    parts = [part.strip() for part in text.split(",")]
    if parts[-1] == "":  # as Python writes a tuple of one element; () has none
        parts.pop()
    if kind is str and len(parts) > 1 and any(re.search(r"\s", part) for part in parts):
        raise FieldError("quote each text, as in \"('a red one', 'two, three')\"")
    if "" in parts:
        raise FieldError("one of its elements is empty")
    return [_scalar(part, kind) for part in parts]


def _quoted(text: str) -> list[str] | None:
    """The texts of a Python literal; None where it is none."""
    value = _literal(text)
    value = [value] if isinstance(value, str) else value
    if isinstance(value, tuple | list) and all(isinstance(v, str) for v in value):
        return list(value)
    return None


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None


def _shown(text: str) -> str:
    short = text if len(text) <= 80 else f"{text[:77]}..."
    value = _literal(short)
    return repr(short if value is None else value)


def fields_of(settings: Any, prefix: str = "") -> dict[str, dataclasses.Field]:
    """The fields of nested dataclasses, by dotted name."""
    found: dict[str, dataclasses.Field] = {}
    for one in dataclasses.fields(settings):
        value, name = getattr(settings, one.name), prefix + one.name
        found |= fields_of(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: one}
    return found


def field_help(settings: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Name, type and default, and help of each field of nested dataclasses, from their `Attributes:`."""
    docs = attribute_docs(type(settings))
    for name, hint in typing.get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if dataclasses.is_dataclass(value):
            yield from field_help(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", f"{describe(hint)}, {value!r}", docs.get(name, "")


def attribute_docs(cls: type) -> dict[str, str]:
    """The `Attributes:` section of a class's docstring, by name."""
    section = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
