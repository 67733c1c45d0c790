"""A profile of a few steps, for TensorBoard's profile plugin and for Perfetto."""

import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import jax

from shortcut_jax.cluster.distributed import say
from shortcut_jax.cluster.logs import LOGGER


def parse_steps(text: str) -> range:
    """The steps that `10:13` names: 10, 11 and 12, as in a slice of Python. None, where the text is empty.

    Raises:
      ValueError: it names no steps; the message says what is wrong.
    """
    if not text:
        return range(0)
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None:
        raise ValueError(f"is {text!r}, but must be FIRST:END, such as 10:13 for steps 10, 11 and 12")
    steps = range(int(found[1]), int(found[2]))
    if steps.start < 1 or not steps:
        raise ValueError(f"is {text!r}, but must be FIRST:END with 1 <= FIRST < END: it stops before step END")
    return steps


class Profiler:
    """Traces the steps of a window; of those that a resumed run has behind it, nothing.

    Every process writes into a folder of its own, such as `process_00000`: `plugins/profile/TIME/` in there holds what
    TensorBoard reads, and `perfetto_trace.json.gz` for ui.perfetto.dev. A trace that cannot be written stops no run.
    """

    def __init__(self, steps: range, folder: Path, start: int):
        """Takes the steps, where to write, and the step that the run continues from."""
        self._steps = range(max(steps.start, start + 1), steps.stop)
        self._folder = folder / f"process_{jax.process_index():05d}"
        self._running = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def starts(self, step: int) -> bool:
        """Whether the trace starts before this step."""
        return bool(self._steps) and step == self._steps.start

    def stops(self, step: int) -> bool:
        """Whether the trace stops after this step."""
        return self._running and step == self._steps.stop - 1

    def start(self) -> None:
        """Starts the trace. The steps before have to be done."""
        self._guarded(lambda: jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True), True)

    def stop(self) -> None:
        """Writes the trace, where one is running. Its last step has to be done."""
        if self._running:
            self._running = False
            if self._guarded(jax.profiler.stop_trace, False):
                say(f"profile of steps {self._steps[0]} to {self._steps[-1]} in {self._folder}")

    def _guarded(self, act: Callable[[], None], running: bool) -> bool:
        try:
            act()
        except (OSError, RuntimeError, ValueError) as error:
            LOGGER.warning("no profile, but the run continues: %s", error)
            return False
        self._running = running
        return True
