"""JSON-lines files that survive a crash: each append is one write, and a line that was cut off is passed over."""

import json
from pathlib import Path
from typing import Any

from shortcut_jax.core.json_text import to_json


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Adds a record at the end of a file, which is made where there is none."""
    line = to_json(record) + "\n"
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, 2)
            if file.read(1) != b"\n":  # the disk was full, or the machine went down, in the middle of a line
                line = "\n" + line
        file.write(line.encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete records of a file, in order; none, where there is no file."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # cut off, see append_line
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
