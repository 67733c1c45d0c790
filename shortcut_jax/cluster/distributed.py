"""Processes and devices: joining the other hosts, simulated devices, and interruptions."""

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import jax
import numpy as np

from shortcut_jax.cluster.bootstrap import JOIN_TIMEOUT, find_place, join
from shortcut_jax.cluster.failures import LOST
from shortcut_jax.cluster.logs import LOGGER


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = JOIN_TIMEOUT,
) -> None:
    """Joins the other processes, where there are others; alone it does nothing. See `joining.find_place`.

    Raises:
      JoinError: they do not come together within `timeout` seconds.
    """
    join(find_place(coordinator, num_processes, process_id, timeout), timeout)


def simulate_devices(num: int) -> None:
    """Makes this process see `num` CPU devices. Has to run before anything asks JAX for its devices."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(f for f in flags if "xla_force_host_platform_device_count" not in f)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", num)


def platform_of(device: Any) -> str:
    """`cpu`, `tpu`, `gpu` for an NVIDIA GPU and `rocm` for an AMD one, both of which JAX calls `gpu`."""
    version = getattr(getattr(device, "client", None), "platform_version", "")
    return "rocm" if device.platform == "gpu" and "rocm" in version.lower() else device.platform


def agree(value: bool) -> bool:
    """Process 0's answer to a question about the disk, the same for all of them."""
    return bool(agree_on(int(value)))


def agree_on(value: int) -> int:
    """Process 0's number, below 2^31, the same for all of them."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32)))


def say(message: str) -> None:
    """Prints a line to standard error, from process 0 only; every process has it in its log."""
    for line in message.strip().splitlines():
        LOGGER.info(line)
    if jax.process_index() == 0:
        print(message, file=sys.stderr, flush=True)


def tell(notes: Iterable[str]) -> None:
    """Says what a reader of files should know, a line each."""
    for note in notes:
        say(f"note: {note}")


class SaidOnce:
    """Says lines, each of them once."""

    def __init__(self) -> None:
        self._said = set[str]()

    def __call__(self, lines: Iterable[str]) -> None:
        """Says those that it has not said before."""
        for line in lines:
            if line not in self._said:
                say(line)
                self._said.add(line)


EXIT_CODES = {signal.SIGTERM: LOST, signal.SIGINT: 130}
"""Exit codes of a run that was interrupted and saved: EX_TEMPFAIL, and the shell's code for Ctrl-C."""


class Interrupted(Exception):  # noqa: N818  (nothing went wrong)
    """Raised by `Interruptions.check`; its argument is the signal."""


_ASKED = itertools.count(1)
"""JAX stops all processes at one number of a sequence, which must not start anew with a second run of a process."""


class Interruptions:
    """Turns SIGTERM and the first Ctrl-C into something that the run asks for; a second Ctrl-C stops at once.

    With several processes JAX's coordination service takes SIGTERM, so that all of them stop at one point; Ctrl-C in
    one of them is handed on to it. There every process has to call `agreed` and `check` equally often.

    Attributes:
      received: the signal that this process caught, or None.
    """

    def __init__(self, told: Callable[[], None] = lambda: None) -> None:
        """`told` is called as soon as a signal is known, possibly within its handler."""
        self.received: signal.Signals | None = None
        self._told = told

    def __enter__(self) -> "Interruptions":
        self._several = jax.process_count() > 1
        handled = (signal.SIGINT,) if self._several else tuple(EXIT_CODES)
        self._previous = {s: signal.signal(s, self._handle) for s in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for which, handler in self._previous.items():
            signal.signal(which, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        self._told()
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)  # as if the cluster had asked: the service tells the others

    def agreed(self) -> signal.Signals | None:
        """The signal to act on now: where one process has one to act on, all have."""
        if not self._several:
            return self.received
        from jax.experimental import multihost_utils

        reached = multihost_utils.reached_preemption_sync_point(next(_ASKED))
        if reached:
            self._told()
        return (self.received or signal.SIGTERM) if reached else None

    def check(self) -> None:
        """Raises Interrupted where a signal came: where nothing is left to be saved."""
        which = self.agreed()
        if which is not None:
            raise Interrupted(which)
