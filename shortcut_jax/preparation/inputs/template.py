"""Captions that are made of other fields: `a photo of a {label}`."""

import re
import string
from collections.abc import Collection, Mapping
from typing import Any

from shortcut_jax.errors import DataError


def fill(template: str, fields: Mapping[str, Any]) -> str:
    """A template with its fields. Raises DataError where it cannot be filled in."""
    try:
        return template.format(**fields)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise _cannot(template, error, fields) from error


def fields_of(template: str, known: Collection[str]) -> set[str]:
    """The fields that a template names. Raises DataError where one is not known, or the braces do not match."""
    try:
        named = {
            re.split(r"[.\[]", name)[0] for _, name, _, _ in string.Formatter().parse(template) if name is not None
        }
    except ValueError as error:
        raise _cannot(template, error, known) from error
    if unknown := sorted(named - {*known}):
        raise _cannot(template, repr(unknown[0]), known)
    return named


def _cannot(template: str, reason: object, fields: Collection[str]) -> DataError:
    return DataError(f"--template={template!r} cannot be filled in ({reason}): the fields are {', '.join(fields)}")
