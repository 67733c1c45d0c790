"""A watchdog: work that does not come to an end is shown, thread by thread, and ends the process."""

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

from shortcut_jax.cluster import failures
from shortcut_jax.core.setting import NOT_NEGATIVE, setting


@dataclass(frozen=True)
class WatchdogSettings:
    """How long work may take before it counts as hung.

    Attributes:
      seconds: limit for a step, its compilation included; 0 turns the watchdog off.
      slow_seconds: limit for everything else: start, first step, checkpoint, validation, sample grid, each line of the
        report.
      grace_seconds: from the dump to the exit: the other processes, which hang on the same, dump theirs as well.
    """

    seconds: float = setting(1800.0, NOT_NEGATIVE)
    slow_seconds: float = setting(7200.0, NOT_NEGATIVE)
    grace_seconds: float = setting(15.0, NOT_NEGATIVE)


class Watchdog:
    """Watches that `beat` is called often enough, from a thread of its own. A context manager.

    When it is not, the stacks of all threads go to standard error and to `hang-PROCESS.txt` in the workdir, and the
    process ends with code 75 (`failures.LOST`). Nothing is saved then: what hangs may be the devices. It sees nothing
    while a thread keeps Python's lock; devices, network and disk are waited for without it.
    """

    def __init__(self, settings: WatchdogSettings, workdir: Path, tell: Callable[[str], None] = lambda line: None):
        """Takes the limits, where to write, and whom to tell (of other processes) that this one ends."""
        self._settings, self._workdir, self._tell = settings, workdir, tell
        self._over = threading.Event()
        self._last: tuple[float, str, float] = (time.monotonic(), "the start", settings.slow_seconds)

    def __enter__(self) -> "Watchdog":
        self.beat("the start", slow=True)
        if self._settings.seconds > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def beat(self, doing: str, slow: bool = False) -> None:
        """What is done from now on, until the next beat."""
        self._last = (time.monotonic(), doing, self._settings.slow_seconds if slow else self._settings.seconds)

    @contextlib.contextmanager
    def slow(self, doing: str) -> Iterator[None]:
        """Work of another kind, after which the former continues with all of its time."""
        _, before, limit = self._last
        self.beat(doing, slow=True)
        yield
        self._last = (time.monotonic(), before, limit)

    def _watch(self) -> None:
        while True:
            since, doing, limit = self._last
            if self._over.wait(max(since + limit - time.monotonic(), 0.01)):
                return
            if self._last[0] == since and time.monotonic() >= since + limit:
                self._end(doing, limit)

    def _end(self, doing: str, limit: float) -> None:
        process = jax.process_index()
        line = f"watchdog: process {process} hangs in {doing} for more than {limit:g} s (watchdog.seconds)"
        path = self._workdir / f"hang-{process}.txt"
        print(f"\n{line}; all threads, also in {path}; exit code {failures.LOST}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        self._tell(f"it hangs in {doing}")
        ending = threading.Timer(self._settings.grace_seconds, failures.end, [failures.LOST])
        ending.daemon = True
        ending.start()  # before the file: the disk may be what hangs
        with contextlib.suppress(OSError), path.open("a") as file:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
        ending.join()
