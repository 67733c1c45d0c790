"""Where the wall time of a process goes: a stopwatch that charges every second to exactly one kind of work."""

import contextlib
import time
from collections.abc import Iterator

STEP_KINDS = ("data", "host", "device")
"""Kinds that make up the time of training steps, as the training loop sees them:

- data: it waited for the next batch (reading, and placing rows on the devices). The devices may have been computing
  the step before meanwhile.
- device: it waited for the metrics of the step before; the devices were computing.
- host: everything else of a step: dispatching it, reading and writing metrics, the progress bar.
"""

OTHER_KINDS = {
    "starting": "setting up: data, weights, compiled helpers",
    "restoring": "restoring a checkpoint",
    "compiling": "compiling steps",
    "saving": "starting and awaiting checkpoints",
    "validating": "validating",
    "sampling": "drawing sample grids",
    "profiling": "starting and writing profiles",
    "reporting": "judging and reporting",
}
"""Kinds that are no training steps, with what is reported of them. They are also states of a run."""


class Stopwatch:
    """Charges each second since it was made to the kind of work that is going on; there is always exactly one."""

    def __init__(self, kind: str):
        """Starts with `kind`."""
        self._seconds: dict[str, float] = {}
        self._kind, self._since = kind, time.perf_counter()

    def switch(self, kind: str) -> str:
        """What follows is work of `kind`. Returns the kind that it was before."""
        now = time.perf_counter()
        self._seconds[self._kind] = self._seconds.get(self._kind, 0.0) + now - self._since
        before, self._kind, self._since = self._kind, kind, now
        return before

    @contextlib.contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        """The block is work of `kind`; afterwards it continues as before."""
        before = self.switch(kind)
        try:
            yield
        finally:
            self.switch(before)

    def seconds(self) -> dict[str, float]:
        """Seconds of each kind so far. They add up to the time since the stopwatch was made."""
        self.switch(self._kind)
        return dict(self._seconds)

    def step_seconds(self) -> dict[str, float]:
        """Those of `STEP_KINDS`."""
        seconds = self.seconds()
        return {kind: seconds.get(kind, 0.0) for kind in STEP_KINDS}
