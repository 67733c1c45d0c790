"""Where one process fails, the others end too, within seconds and with a line that says which one and why.

JAX by itself notices a lost process after a minute or more, and then aborts the others. So a process that fails leaves
a text in the key-value store before it goes, and in every process a thread looks for such texts.
"""

import atexit
import contextlib
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from shortcut_jax.cluster import key_value
from shortcut_jax.errors import JoinError

INTERVAL = 1.0
"""Seconds between two looks for failures."""

GRACE = 2.0
"""Seconds that a process has to end by an error of its own, once another has failed: often it is the same one."""

LINGER = 15.0
"""Seconds that process 0, which holds the store, waits at most for the others to read what failed."""

LOST = JoinError.exit_code
"""Exit code of a process whose peers were lost: try again."""

_TOPIC, _LEFT = "failed", "left"
LAST_SECONDS = 2.0
"""For each thing that is done when a process ends at once."""

_last: list[Callable[[], None]] = []
_leaving = threading.Lock()
_stop = threading.Event()


class Failure(NamedTuple):
    """What ended a process.

    Attributes:
      process: its id.
      line: what it said.
      code: exit code for the others.
    """

    process: int
    line: str
    code: int

    def __str__(self) -> str:
        return f"process {self.process} failed: {self.line}"


def watch() -> None:
    """Starts the thread that ends this process when another one fails."""
    thread = threading.Thread(target=_watch, name="failures", daemon=True)
    thread.start()

    def stop() -> None:
        _stop.set()
        thread.join(timeout=5.0)

    atexit.register(stop)  # before JAX closes the store, which it registered earlier


def _watch() -> None:
    while not _stop.wait(INTERVAL):
        failure = of_another()
        if failure and not _stop.wait(GRACE):
            leave(failure.code, f"error: {failure}")


def of_another(wait: float = 0.0) -> Failure | None:
    """The failure of another process, if there is one now or within `wait` seconds."""
    until = time.monotonic() + wait
    while key_value.joined():
        try:
            found = key_value.texts(_TOPIC)
        except Exception:  # the store itself is gone: JAX's own error is on its way
            found = {}
        others = [Failure(i, **json.loads(text)) for i, text in sorted(found.items()) if i != key_value.process_id()]
        if others or time.monotonic() >= until:
            return others[0] if others else None
        time.sleep(0.2)
    return None


def fail(line: str, code: int, code_of_others: int, details: str = "") -> None:
    """Ends this process where it is one of several, and tells the others why; alone, it returns."""
    if key_value.joined():
        leave(code, f"{details}error: {line}", failed=json.dumps({"line": line, "code": code_of_others}))


def leave(code: int, line: str, failed: str = "") -> None:
    """Ends this process at once: a regular exit would wait for the others at a barrier of JAX's."""
    _leaving.acquire()  # never released: who comes second waits for the end
    print(line, file=sys.stderr, flush=True)
    try:
        if failed:
            key_value.put(_TOPIC, failed)
        key_value.put(_LEFT, "")
        until = time.monotonic() + LINGER
        while key_value.process_id() == 0 and time.monotonic() < until:
            if len(key_value.texts(_LEFT)) == key_value.num_processes():
                time.sleep(0.2)  # the last one has its answer
                break
            time.sleep(0.1)
    except Exception as error:
        print(f"the other processes could not be notified: {str(error).splitlines()[0]}", file=sys.stderr)
    end(code)


def at_end(act: Callable[[], None]) -> None:
    """Has something done when `end` ends this process, as far as it takes no longer than `LAST_SECONDS`."""
    _last.append(act)


def forget(act: Callable[[], None]) -> None:
    """Takes an `at_end` back."""
    with contextlib.suppress(ValueError):
        _last.remove(act)


def end(code: int) -> NoReturn:
    """Ends this process at once, and its data workers, which only a regular exit would end."""
    for act in list(_last):
        thread = threading.Thread(target=act, daemon=True)  # what hangs may be the disk
        thread.start()
        thread.join(LAST_SECONDS)
    for worker in multiprocessing.active_children():
        worker.kill()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
