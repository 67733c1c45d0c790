"""The other processes of a run: whether they live, and a clear end where one does not.

A lost process stops all others: their collectives never come to an end, or fail with an error that names no cause. The
coordination service of JAX would abort them after a while. Here they say which process is missing, and why if that is
known, and exit with code 75, within `timeout` seconds and a few more.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

import jax

from shortcut_jax.cluster import failures, key_value
from shortcut_jax.cluster.failures import LOST

GRACE_SECONDS = 10.0
"""After one process failed by itself, the others have that long to fail of the same, with a message of their own."""

_ALIVE, _LEFT, _VERDICT = "peers/alive", "peers/left", "peers/verdict"


class Peers:
    """Signs of life through the key-value store of the coordination service, in a thread. A context manager.

    Every process writes a count a few times in each `timeout`; process 0 reads them all and writes a verdict, which the
    others read. With one process nothing is done.
    """

    def __init__(self, timeout: float):
        """Takes the seconds without a sign of life after which a process is lost."""
        self._timeout = timeout
        self._interval = min(timeout / 10.0, 5.0)
        self._over = threading.Event()
        self._seen: dict[int, tuple[str, float]] = {}

    def __enter__(self) -> "Peers":
        self._num, self._index = key_value.num_processes(), key_value.process_id()
        if self._num > 1:
            now = time.monotonic()
            self._seen = dict.fromkeys(range(self._num), ("", now))
            self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
            self._answered = now
            self._thread.start()
            threading.Thread(target=self._guard, name="peers guard", daemon=True).start()
            if self._index > 0:
                _on_abort(self._explain_abort)
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if self._num == 1 or error is not None:
            return  # after an error the thread continues: the rest may wait for processes that wait for this one
        self._over.set()
        self._thread.join(self._timeout)
        self._put(_ALIVE, "done")

    def failed(self, error: BaseException) -> None:
        """Does not return where this process failed because another is gone: it ends as soon as that is known."""
        if self._num == 1 or not isinstance(error, ValueError | RuntimeError) or not _is_of_peers(str(error)):
            return
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        print(f"process {self._index}: {reason}", file=sys.stderr, flush=True)
        time.sleep(self._timeout + 4 * self._interval)

    def leave(self, reason: str) -> None:
        """Tells the others that this process ends, and why."""
        if self._num > 1:
            self._put(_LEFT, reason)

    def _put(self, topic: str, text: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 may be gone
            key_value.put(topic, text)

    def _watch(self) -> None:
        count = 0
        left_at: float | None = None
        while not self._over.wait(self._interval):
            count += 1
            now = time.monotonic()
            try:
                key_value.put(_ALIVE, str(count))
                verdict = key_value.texts(_VERDICT).get(0)
                left = key_value.texts(_LEFT) if self._index == 0 else {}
                lost = self._lost(now) if self._index == 0 else []
                self._answered = time.monotonic()
            except jax.errors.JaxRuntimeError:
                continue
            left_at = left_at or (now if left else None)
            missing = {i: f"failed: {reason}" for i, reason in left.items()}
            missing |= {i: f"gave no sign of life for {self._timeout:g} s" for i in lost if i not in missing}
            ripe = lost or (left_at and now - left_at > GRACE_SECONDS and len(left) < self._num)
            if ripe and not verdict:
                verdict = "; ".join(f"process {i} of {self._num} {why}" for i, why in sorted(missing.items()))
                self._put(_VERDICT, verdict)
            if verdict:
                self._end(verdict)

    def _guard(self) -> None:
        """Ends this process where process 0 does not answer; the calls in `_watch` wait for it without a limit."""
        while not self._over.wait(self._interval):
            if time.monotonic() - self._answered > self._timeout:
                self._end(f"process 0, which coordinates, does not answer for {self._timeout:g} s")

    def _lost(self, now: float) -> list[int]:
        for index, value in key_value.texts(_ALIVE).items():
            if self._seen[index][0] != value:
                self._seen[index] = (value, now)
        return [i for i, (value, at) in self._seen.items() if value != "done" and now - at > self._timeout]

    def _end(self, verdict: str) -> None:
        if self._over.is_set():
            return
        self._over.set()
        print(self._line(verdict), file=sys.stderr, flush=True)
        if self._index == 0:
            time.sleep(3 * self._interval)  # the others read it here
        failures.end(LOST)

    def _line(self, verdict: str) -> str:
        return (
            f"\nprocess {self._index} stops: {verdict}; rerun the same command to resume from the last checkpoint "
            f"(exit code {LOST})"
        )

    def _explain_abort(self) -> None:
        """Ends the process where the coordination service aborts it because process 0 is gone."""
        host, port = key_value.address().rsplit(":", 1)
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
        except OSError:
            os.write(2, (self._line(f"process 0 of {self._num}, which coordinates, is gone") + "\n").encode())
            failures.end(LOST)


def _is_of_peers(text: str) -> bool:
    """Whether an error looks like that of a collective or a barrier that another process left."""
    signs = ("Gloo", "gloo", "NCCL", "closed by peer", "Connection", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")
    return any(sign in text for sign in (*signs, "barrier", "Barrier", "Timed out", "CANCELLED", "coordination"))


def _on_abort(explain: Any) -> None:
    """Calls `explain` before the process aborts.

    When process 0 is gone, the service's client calls abort() at once, from a thread of its own; JAX has no hook there
    that Python can set, and a handler of Python's `signal` module would run too late: in the main thread, later.
    """

    def handle(number: int) -> None:
        explain()
        signal_of_c(number, None)  # the default: the abort continues

    signal_of_c = ctypes.CDLL(None).signal
    signal_of_c.argtypes, signal_of_c.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    _HANDLERS.append(handler)
    signal_of_c(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


_HANDLERS: list[Any] = []
"""Kept alive: C calls them."""
