"""Two configs of one workdir: where they differ, and what may differ when a run is resumed."""

import dataclasses
import functools
from typing import Any

from shortcut_jax.config.fields import fields_of
from shortcut_jax.config.schema import Settings
from shortcut_jax.core.setting import FREE, IDENTITY, SCHEDULE


@functools.cache
def resume_marks() -> dict[str, str]:
    """Whether each field of a config, by dotted name, may change when a run is resumed; see `core.setting`."""
    mark = lambda field: field.metadata.get("resume", IDENTITY)
    groups = {one.name: mark(one) for one in dataclasses.fields(Settings)}
    own = {name: mark(field) for name, field in fields_of(Settings()).items()}
    return {name: groups[name.partition(".")[0]] if it == IDENTITY else it for name, it in own.items()}


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys; lists become tuples, so that JSON compares equal."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = tuple(value) if isinstance(value, list) else value
    return flat


def compare(stored: dict[str, Any], current: dict[str, Any]) -> dict[str, list[str]]:
    """Differences of two `to_dict` results by mark, each as `key: stored -> current`."""
    old, new = flatten(stored), flatten(current)
    marks = resume_marks()
    differences: dict[str, list[str]] = {IDENTITY: [], SCHEDULE: [], FREE: []}
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            differences[marks.get(key, IDENTITY)].append(f"{key}: {old.get(key)!r} -> {new.get(key)!r}")
    return differences
