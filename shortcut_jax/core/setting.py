"""A field of a config, said once: its default, the range of its values, whether it may change when a run is resumed."""

from collections.abc import Callable
from dataclasses import field
from typing import Any, NamedTuple


class Range(NamedTuple):
    """The values that a number may have.

    Attributes:
      text: what it must be, for messages.
      holds: whether a value is one.
    """

    text: str
    holds: Callable[[float], bool]


AT_LEAST_ONE = Range("be at least 1", lambda x: x >= 1)
NOT_NEGATIVE = Range("not be negative", lambda x: x >= 0)
POSITIVE = Range("be positive", lambda x: x > 0)
DECAY = Range("be in [0, 1)", lambda x: 0.0 <= x < 1.0)
PROBABILITY = Range("be in [0, 1]", lambda x: 0.0 <= x <= 1.0)

IDENTITY, SCHEDULE, FREE = "identity", "schedule", "free"
"""What may change when a workdir is resumed: `identity` never, `schedule` with a log line, `free` silently."""


def setting(default: Any, within: Range | None = None, resume: str = IDENTITY) -> Any:
    """A field of a dataclass of settings; its meaning stands in the class's docstring.

    Args:
      default: its value, or for a group of fields its dataclass.
      within: the range of a number; None for any.
      resume: one of the marks above; that of a group is that of all its fields.
    """
    metadata = {"within": within, "resume": resume}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)
