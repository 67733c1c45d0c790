"""Processes and devices: joining the other hosts, simulated devices, and interruptions."""

import os
import signal
import sys
from types import FrameType

import jax


def initialize() -> None:
    """Joins the other processes where `JAX_COORDINATOR_ADDRESS` (host:port) is set; does nothing otherwise.

    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` say how many processes there are and which one this is.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address:
        num, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
        jax.distributed.initialize(address, int(num) if num else None, int(index) if index else None)


def simulate_devices(num: int) -> None:
    """Makes this process see `num` CPU devices. Has to run before anything asks JAX for its devices."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(f for f in flags if "xla_force_host_platform_device_count" not in f)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", num)


def say(message: str) -> None:
    """Prints a line to standard error, from process 0 only."""
    if jax.process_index() == 0:
        print(message, file=sys.stderr, flush=True)


EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}
"""Exit codes of a run that was interrupted and saved: EX_TEMPFAIL, and the shell's code for Ctrl-C."""


class Interrupted(Exception):  # noqa: N818  (nothing went wrong)
    """Raised by `Interruptions.check`; its argument is the signal."""


class Interruptions:
    """Turns SIGTERM and the first Ctrl-C into a flag that the loop reads; a second Ctrl-C stops at once.

    With several processes JAX's coordination service takes SIGTERM instead, so that all of them stop at one step.

    Attributes:
      received: the signal, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> "Interruptions":
        handled = EXIT_CODES if jax.process_count() == 1 else {}
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

    def agreed(self, step: int) -> signal.Signals | None:
        """The signal to act on at this step, the same on every process."""
        if jax.process_count() == 1:
            return self.received
        from jax.experimental import multihost_utils

        return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None

    def check(self) -> None:
        """Raises Interrupted where a signal came: for work after the last save, which needs no saving of its own."""
        if self.received is not None:
            raise Interrupted(self.received)
