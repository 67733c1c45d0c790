"""JSON that every reader takes: NaN and infinities, which JSON has no numbers for, become null."""

import json
import math
from typing import Any


def to_json(value: Any, **options: Any) -> str:
    """A value as JSON; `options` are those of `json.dumps`."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
