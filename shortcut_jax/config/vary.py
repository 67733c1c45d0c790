"""A config as it is with several values of one field: `bench --vary`, `train --dry_run --compare`."""

import re
from typing import Any

from shortcut_jax.config.checks import from_config
from shortcut_jax.config.load import set_field
from shortcut_jax.config.schema import Settings, known_fields, parse_field, unknown_key
from shortcut_jax.errors import UsageError

_COMMA = re.compile(r",(?![^(\[]*[)\]])")
"""A comma outside of brackets, between two values."""


def variants(config: Any, flag: str, vary: str) -> list[tuple[str, Settings]]:
    """Names and settings of a config with each value of a field, all of them checked.

    Args:
      config: of ml_collections.
      flag: that names field and values, for messages.
      vary: what it says: `objective=flow,scfm`.

    Raises:
      UsageError: no such field.
      ConfigError: a value that it cannot have.
    """
    key, _, choices = vary.partition("=")
    values = re.split(_COMMA, choices)
    if key not in known_fields():
        raise UsageError(f"--{flag}={vary}: {key!r} cannot be set to {values[0]!r}: {unknown_key(key)}")
    if not choices:
        raise UsageError(f"--{flag}={vary} names no value: {key}=A,B")
    made = []
    for value in values:
        changed = config.copy_and_resolve_references()
        set_field(changed, key, parse_field(key, value))
        made.append((f"{key}={value}", from_config(changed)))
    return made
