"""Numbers and tables as text."""

from collections.abc import Sequence


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, the first one the head, as an aligned Markdown table."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    line = lambda cells: "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"
    return "\n".join([line(rows[0]), line(["-" * w for w in widths]), *map(line, rows[1:])])


def count_label(num: int, noun: str = "step") -> str:
    """`1 step`, `2 steps`."""
    return f"{num} {noun}{'s' * (num > 1)}"
