"""Compiled programs: where they are kept between processes, and how long making them takes."""

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from jax import monitoring

from shortcut_jax.cluster.distributed import say

_STAGES = "/jax/core/compile/"
_FOUND = "/jax/compilation_cache/cache_hits"


def keep_programs() -> Path | None:
    """Turns JAX's persistent compilation cache on, and says so; returns its folder, or None where it is disabled.

    The folder is `JAX_COMPILATION_CACHE_DIR` where that is set, else one in `XDG_CACHE_HOME` or `~/.cache`.
    `JAX_ENABLE_COMPILATION_CACHE=false` disables it.
    """
    config: Any = jax.config  # its fields are made when JAX is imported, unseen by type checkers
    if not config.jax_enable_compilation_cache:
        say("compiled programs are not kept")
        return None
    if not config.jax_compilation_cache_dir:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        config.update("jax_compilation_cache_dir", str(cache / "shortcut_jax" / "programs"))
    folder = Path(config.jax_compilation_cache_dir)
    say(f"compiled programs are kept in {folder}")
    return folder


class CompileClock:
    """Counts what is compiled while it is open: `with CompileClock() as clock: ...`.

    Attributes:
      seconds: of tracing, lowering and compiling (or of reading kept programs).
      programs: compiled, or read.
      found: of these, how many had been kept.
    """

    def __init__(self) -> None:
        self.seconds, self.programs, self.found = 0.0, 0, 0

    def __enter__(self) -> "CompileClock":
        monitoring.register_event_duration_secs_listener(self._took)
        monitoring.register_event_listener(self._happened)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        monitoring.unregister_event_duration_listener(self._took)
        monitoring.unregister_event_listener(self._happened)

    def __str__(self) -> str:
        kept = f", {self.found} of them kept from before" if self.found else ""
        return f"{self.programs} program{'s' * (self.programs != 1)} compiled in {self.seconds:.1f} s{kept}"

    def _took(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith(_STAGES):
            self.seconds += duration_secs
            self.programs += event.endswith("backend_compile_duration")

    def _happened(self, event: str, **_: Any) -> None:
        self.found += event == _FOUND
