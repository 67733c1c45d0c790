"""What one GPU does with this package, in one command: `python -m benchmarks.device --minutes=9 --out=FOLDER`.

Runs the parts of `benchmarks/device_parts.py` in order of their value, each in a process of its own under a limit of
time, and writes FOLDER/device.json and FOLDER/device.md anew with every figure that comes, so that a part that hangs,
fails or is cut off costs nothing of the others. No download: the digits come with scikit-learn, and `emoji64` is
trained where its images are there (`--emoji=FOLDER`).

`--tiny` does the same with small shapes, on any device: to see that it works before a GPU is asked for.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shortcut_jax.core.json_text import to_json
from shortcut_jax.core.text import markdown, write_text

PARTS: dict[str, float] = {
    "device": 40,
    "attention": 60,
    "products": 60,
    "steps-scfm": 150,
    "steps-flow": 120,
    "sampling": 90,
    "digits": 120,
    "emoji64": 240,
}
"""Parts, most valuable first, and the seconds each may take."""

LEAST = 15.0
"""Seconds that have to be left for a part to be started."""

EMOJI = (Path("shared/data/emoji64"), Path("../shared/data/emoji64"))


def main(argv: Sequence[str]) -> int:
    """Runs the parts; returns 0 where none failed."""
    parser = argparse.ArgumentParser("python -m benchmarks.device", description="What one GPU does with this package.")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--out", type=Path, default=Path("runs/device"), help="folder of device.json and device.md")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--emoji", type=Path, default=next((p for p in EMOJI if p.is_dir()), EMOJI[0]))
    parser.add_argument("--tiny", action="store_true", help="small shapes, for any device")
    options = parser.parse_args(list(argv[1:]))
    names = options.parts.split(",")
    if unknown := sorted(set(names) - PARTS.keys()):
        parser.error(f"--parts: there is no {', '.join(unknown)}; choose of {', '.join(PARTS)}")
    if options.minutes <= 0:
        parser.error(f"--minutes is {options.minutes:g}, but must be positive")
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.out, " ".join(["python -m benchmarks.device", *argv[1:]]))
    until = time.monotonic() + 60 * options.minutes
    for name in names:
        given = ["--tiny"] * options.tiny + [f"--emoji={options.emoji}", f"--out={options.out}"]
        command = [sys.executable, "-m", "benchmarks.device_parts", name, *given]
        report.add(name, command, min(PARTS[name], until - time.monotonic()))
    print(f"\n{options.out / 'device.md'}")
    return int(any(part["outcome"].startswith("failed") for part in report.parts))


class Report:
    """The two files.

    Attributes:
      parts: name, seconds, outcome and rows of each part so far.
    """

    def __init__(self, folder: Path, command: str):
        """Of a command, into a folder that is there."""
        self.parts: list[dict[str, Any]] = []
        self._folder, self._command, self._date = folder, command, time.strftime("%Y-%m-%d")

    def add(self, name: str, command: Sequence[str], limit: float) -> None:
        """Runs a part and writes what it says as it comes."""
        part: dict[str, Any] = {"name": name, "seconds": 0.0, "outcome": "running", "rows": []}
        self.parts.append(part)

        def take(row: dict[str, Any]) -> None:
            part["rows"].append(row)
            print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
            self.write()

        begin = time.monotonic()
        if limit < LEAST:
            part["outcome"] = "not started: no time was left"
        else:
            part["outcome"] = run_part(command, limit, take, self._folder / f"{name}.log")
        part["seconds"] = round(time.monotonic() - begin, 1)
        print(f"{name}: {part['outcome']} ({part['seconds']} s)", flush=True)
        self.write()

    def write(self) -> None:
        """Both files, each whole at any moment."""
        record = {"command": self._command, "date": self._date, "parts": self.parts}
        write_text(self._folder / "device.json", to_json(record, indent=1) + "\n")
        write_text(self._folder / "device.md", self._markdown())

    def _markdown(self) -> str:
        lines = [f"`{self._command}`, {self._date}"]
        for part in self.parts:
            lines.append(f"## {part['name']}\n\n{part['outcome']}, {part['seconds']} s")
            if rows := part["rows"]:
                names = list(dict.fromkeys(name for row in rows for name in row))
                lines.append(markdown([names, *([str(row.get(name, "")) for name in names] for row in rows)]))
        return "\n\n".join(lines) + "\n"


def run_part(command: Sequence[str], limit: float, take: Callable[[dict[str, Any]], None], log: Path) -> str:
    """Runs a command for at most `limit` seconds, and passes on the JSON objects that it prints, a line each.

    Args:
      command: it and all that it starts are killed in the end.
      limit: seconds.
      take: is given each object at once; lines that are none are left out.
      log: file of its standard error.

    Returns:
      `done`, `skipped: why`, `cut off after ... s`, or `failed: ` with the last line of its standard error.
    """
    skipped: list[str] = []

    def read() -> None:
        for line in process.stdout or ():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if "skipped" in row:
                skipped.append(row["skipped"])
            else:
                take(row)

    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
        reader = threading.Thread(target=read)
        reader.start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(limit)
        code = process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        reader.join()
        process.wait()
    if code is None:
        return f"cut off after {limit:.0f} s"
    if code:
        said = [line for line in log.read_text().splitlines() if line.strip()]
        return f"failed: {said[-1].strip() if said else f'exit code {code}'} (see {log.name})"
    return f"skipped: {skipped[-1]}" if skipped else "done"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
