"""JSON objects in files and headers of checkpoints."""

import json
from pathlib import Path
from typing import Any

from shortcut_jax.weights.rules import ConversionError


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises ConversionError where it is none."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConversionError(f"{file} is not JSON: {error}") from error
    return parse_json(text, str(file))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """A JSON object. Raises ConversionError, which names `where`, if the text is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{where} is not a JSON object")
    return value
