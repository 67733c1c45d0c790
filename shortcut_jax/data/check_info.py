"""Whether the JSON of a set (`set.json`) is of the form that it is written in."""

from collections.abc import Callable, Mapping
from typing import Any

MOST = 2**31
"""A larger number is no size of a record."""

Check = Callable[[Any], bool]


def _whole(least: int = 0, most: int = MOST) -> Check:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and least <= x <= most


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < float("inf")


def _text(x: Any) -> bool:
    return isinstance(x, str)


def _list_of(check: Check) -> Check:
    return lambda x: isinstance(x, list) and all(map(check, x))


def _mapping_to(check: Check) -> Check:
    return lambda x: isinstance(x, dict) and all(map(check, x.values()))


def _one_of(*values: str) -> Check:
    return lambda x: isinstance(x, str) and x in values


def _fields(checks: Mapping[str, Check], optional: frozenset[str] = frozenset()) -> Check:
    def check(x: Any) -> bool:
        known = isinstance(x, dict) and x.keys() <= checks.keys() and checks.keys() - x.keys() <= optional
        return known and all(checks[name](value) for name, value in x.items())

    return check


_size = _whole(1, 2**20)
_TEXT = {
    "states": _one_of("full", "trimmed"),
    "dtype": _one_of("bfloat16", "float8"),
    "tokens": _size,
    "width": _size,
    "pooled_width": _size,
    "error": lambda x: x is None or _number(x),  # of states that are not finite
    "cut": lambda x: x is None or _whole(most=2**53)(x),
}
_LATENTS = {"channels": _size, "stride": _size, "scale": _number, "shift": _number}
_or_none = lambda check: lambda x: x is None or check(x)
_FIELDS: dict[str, Check] = {
    "store": _one_of("pixels", "latents", "captions"),
    "buckets": lambda x: _list_of(lambda size: _list_of(_size)(size) and len(size) == 2)(x) and bool(x),
    "counts": _mapping_to(_list_of(_whole(most=2**53))),
    "request": lambda x: isinstance(x, dict),
    "skipped": _mapping_to(_whole(most=2**53)),
    "unused": _mapping_to(_whole(most=2**53)),
    "enlarged": _whole(most=2**53),
    "text": _or_none(_fields(_TEXT, optional=frozenset({"cut"}))),  # which older sets lack
    "latents": _or_none(_fields(_LATENTS)),
    "encoders": _mapping_to(lambda x: _mapping_to(_text)(x) and {"origin", "content"} <= x.keys()),
    "eval_prompts": _list_of(_text),
    "format_version": _whole(),
}


_OPTIONAL = {"unused"}
"""Fields that older sets lack."""


def check_info(stored: Any) -> None:
    """Raises ValueError, in one line, where the JSON of a set lacks the fields of one."""
    if not isinstance(stored, dict):
        raise ValueError(f"it holds a {type(stored).__name__}, not an object")
    if missing := sorted(_FIELDS.keys() - stored.keys() - _OPTIONAL):
        raise ValueError(f"it has no {missing[0]}")
    if unknown := sorted(stored.keys() - _FIELDS.keys()):
        raise ValueError(f"it has an unknown {unknown[0]!r}"[:200])
    for name, check in _FIELDS.items():
        if name in stored and not check(stored[name]):
            raise ValueError(f"its {name} cannot be {stored[name]!r:.80}")
    if any(len(numbers) != len(stored["buckets"]) for numbers in stored["counts"].values()):
        raise ValueError(f"its counts are not of {len(stored['buckets'])} buckets each")
    if not sum(map(sum, stored["counts"].values())):
        raise ValueError("it counts no records")
    if stored["store"] != "pixels" and not (stored["text"] and stored["latents"]):
        raise ValueError(f"a set of {stored['store']} has text and latents")
