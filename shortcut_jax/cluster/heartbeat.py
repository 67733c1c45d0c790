"""Progress of a run for whoever watches from outside: one line of JSON a process, replaced every few seconds.

Process 0 writes `heartbeat.json` in the workdir, process 3 `heartbeats/process_00003.json`:

- step: the newest step that is known to be done; steps: of the whole run.
- state: training, one of `timing.OTHER_KINDS`, or at the end finished, stopped (at `--stop_at`), interrupted or failed.
- loss, images_per_second: as last known, or null.
- time: when this was written (Unix time). It is written by the training loop itself, so a `time` that stays behind
  means that the run does, unless the state says why (compiling, sampling, ...).
- process, host, pid: who writes.
- session, seconds, skipped: see `goodput.account`.
"""

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from shortcut_jax.cluster.goodput import ENDS, Account, account
from shortcut_jax.cluster.json_lines import append_line, read_lines
from shortcut_jax.cluster.logs import LOGGER
from shortcut_jax.cluster.timing import Stopwatch
from shortcut_jax.core.json_text import to_json

HEARTBEAT = "heartbeat.json"
LEDGER = "goodput.jsonl"


def heartbeat_file(workdir: Path, index: int) -> Path:
    """The heartbeat of process `index`."""
    return workdir / HEARTBEAT if index == 0 else workdir / "heartbeats" / f"process_{index:05d}.json"


class Progress:
    """Where a process is and what its time goes into: kept in its heartbeat, its log and the record of goodput.

    Attributes:
      watch: charges every second to a kind of work.
      rate: images a second, once they are known.
    """

    def __init__(self, workdir: Path, step: int, steps: int, watch: Stopwatch, every: float = 5.0):
        """Begins a session at `step` of `steps`; it began when `watch` did. Beats are `every` seconds apart."""
        self.watch = watch
        self.rate: float | None = None
        self._workdir, self._steps, self._every = workdir, steps, every
        self._index, self._host = jax.process_index(), socket.gethostname()
        self._file = heartbeat_file(workdir, self._index)
        self._session = round(time.time() - sum(watch.seconds().values()), 3)
        self._step, self._state = step, "starting"
        self._loss: float | None = None
        self._skipped = self._step_seconds = self._beaten = 0.0
        self._broken: set[str] = set()
        if self._index == 0:
            self._adopt()
        self.begin(step)
        self._write()

    def begin(self, step: int) -> None:
        """The session continues from `step`."""
        self._step = step
        self.note()

    @property
    def due(self) -> bool:
        """Whether it is time for a beat."""
        return time.monotonic() - self._beaten >= self._every

    @contextlib.contextmanager
    def doing(self, kind: str) -> Iterator[None]:
        """The block is one of `timing.OTHER_KINDS`; the heartbeat says so at once, for it may take its time."""
        before, self._state = self._state, kind
        LOGGER.info("%s, step %d", kind, self._step)
        with self.watch(kind):
            self._write()
            yield
        self._state = before

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """The block is training steps, but for what is said to be something else."""
        before, self._state = self._state, "training"
        with self.watch("host"):
            yield
        self._state = before

    def done(self, step: int, skipped: bool) -> None:
        """A step is known to be done. The time since the last one was its own."""
        now = sum(self.watch.step_seconds().values())
        if skipped:
            self._skipped += now - self._step_seconds
        self._step, self._step_seconds = step, now

    def saw(self, loss: float) -> None:
        """Takes a loss for the next heartbeat, without one."""
        self._loss = loss if math.isfinite(loss) else None

    def beat(self, loss: float) -> None:
        """Writes the heartbeat."""
        self.saw(loss)
        self._write()

    def note(self) -> None:
        """Adds a line to the record of goodput: at the beginning, at each checkpoint, at the end."""
        if self._index == 0:
            self._guarded(LEDGER, lambda: append_line(self._workdir / LEDGER, self._record()))

    def end(self, state: str) -> None:
        """The last beat; `state` is one of `goodput.ENDS`."""
        self._state = state
        LOGGER.info("%s at step %d", state, self._step)
        self.note()
        self._write()

    def account(self) -> Account:
        """Where the time of the run went, up to now and over all its sessions. For process 0."""
        kept = [record for record in read_lines(self._workdir / LEDGER) if _is_record(record)]
        return account([*kept, self._record()])

    def _record(self) -> dict[str, Any]:
        seconds = {kind: round(value, 3) for kind, value in self.watch.seconds().items()}
        ledger = {"session": self._session, "step": self._step, "state": self._state, "seconds": seconds}
        return {**ledger, "skipped": round(self._skipped, 3)}

    def _write(self) -> None:
        who = {"process": self._index, "host": self._host, "pid": os.getpid()}
        shown = {
            "time": round(time.time(), 3),
            "steps": self._steps,
            "loss": self._loss,
            "images_per_second": self.rate,
        }
        line = to_json({**self._record(), **shown, **who}) + "\n"

        def replace() -> None:
            self._file.parent.mkdir(exist_ok=True)
            part = self._file.with_name(self._file.name + ".part")
            part.write_text(line)
            part.replace(self._file)

        self._guarded(self._file.name, replace)
        self._beaten = time.monotonic()

    def _guarded(self, what: str, write: Any) -> None:
        """Says, once, that a file cannot be written: no reason to stop training."""
        try:
            write()
        except OSError as error:
            if what not in self._broken:
                LOGGER.warning("%s cannot be written, but the run continues: %s", what, error)
            self._broken.add(what)

    def _adopt(self) -> None:
        """Takes what a session that was killed left in its heartbeat into the record of goodput."""
        try:
            left = json.loads(self._file.read_text())
            known = [r for r in read_lines(self._workdir / LEDGER) if r["session"] == left["session"]]
            newer = {key: left[key] for key in ("session", "step", "state", "seconds", "skipped")}
            if known and known[-1]["state"] not in ENDS and _total(newer) > _total(known[-1]):
                append_line(self._workdir / LEDGER, newer)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return  # none, or of another kind


def _is_record(record: dict[str, Any]) -> bool:
    """Whether a line of the ledger is one of ours: people may have edited it."""
    seconds = record.get("seconds")
    numbers = [record.get("session"), record.get("step"), record.get("skipped")]
    numbers += seconds.values() if isinstance(seconds, dict) else [None]
    return isinstance(record.get("state"), str) and all(isinstance(number, int | float) for number in numbers)


def _total(record: dict[str, Any]) -> float:
    return sum(record["seconds"].values())
