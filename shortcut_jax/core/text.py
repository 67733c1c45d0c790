"""Numbers and tables as text, and text as a file."""

import os
import uuid
from collections.abc import Sequence
from pathlib import Path


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, the first one the head, as an aligned Markdown table."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    line = lambda cells: "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"
    return "\n".join([line(rows[0]), line(["-" * w for w in widths]), *map(line, rows[1:])])


def count_label(num: int, noun: str = "step") -> str:
    """`1 step`, `2 steps`."""
    return f"{num} {noun}{'s' * (num > 1)}"


def write_text(path: Path, text: str) -> None:
    """Writes text that is there as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
