"""The weights of a training run, view by view, for sampling."""

from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from shortcut_jax.errors import CheckpointError, ConfigError
from shortcut_jax.run.assembly import Assembly
from shortcut_jax.run.start_from import freeze, load_base, open_initial
from shortcut_jax.runtime.checkpoint import Checkpoints
from shortcut_jax.steps.networks import TEACHER, Adapted, teacher_weights
from shortcut_jax.weights.finite import check_placed

ITEM_OF = {"online": "params", "fast": "fast", "slow": "slow"}
"""View -> the item of a checkpoint that holds it."""


class RunWeights:
    """Reads views of the checkpoints of a run, all of one step; a base is on devices once.

    Attributes:
      step: the training step of the weights that were read; None before the first.
    """

    def __init__(self, assembly: Assembly, folder: Path, base: str | Path | None, record: dict[str, Any] | None):
        """Reads nothing.

        Args:
          assembly: of the run.
          folder: of the checkpoints.
          base: of a run that trained adapters, where it has moved.
          record: of the base, as the checkpoints keep it.
        """
        self._assembly, self._folder, self._record = assembly, folder, record
        self._base_path = str(base or (record or {}).get("path"))
        self.step: int | None = None

    def view(self, name: str, lora_scale: float = 1.0) -> Any:
        """A view at `step`, by default that of the newest readable checkpoint; `teacher` is what the run learned from.

        Raises:
          CheckpointError: it cannot be read.
          ConfigError: a teacher is asked for, and there was none or it is not at hand.
          ConversionError: weights that are not finite.
        """
        if name == TEACHER:
            return self._teacher()
        trained = self._trained(name)
        if self._assembly.settings.train == "all":
            return trained
        return Adapted(self._base, trained, self.strength(lora_scale))

    def strength(self, lora_scale: float) -> Any:
        """The scale of `Adapted` for a strength of adapters."""
        return jnp.float32(self._assembly.settings.lora.scale * lora_scale)

    def _trained(self, view: str) -> Any:
        shapes = self._assembly.state_shapes
        wanted = shapes.params if view == "online" else getattr(shapes.ema, view)
        item, checkpoints = ITEM_OF[view], Checkpoints(self._folder, read_only=True)
        try:
            if not checkpoints.holding(item):
                held = " or ".join(v for v, name in ITEM_OF.items() if checkpoints.holding(name))
                raise CheckpointError(
                    f"the checkpoints in {self._folder} lack the view {view!r}: choose {held or 'another workdir'}"
                )
            read = lambda step: (checkpoints.restore(step, {item: wanted})[item], step)
            trained, self.step = checkpoints.newest_readable(read) if self.step is None else read(self.step)
        finally:
            checkpoints.close()
        return check_placed(trained, f"{view} weights of step {self.step} in {self._folder.parent}")

    @cached_property
    def _base(self) -> Any:
        return load_base(self._assembly, self._base_path, self._record or {})

    def _teacher(self) -> Any:
        settings = self._assembly.settings
        if not settings.has_base:
            raise ConfigError(f"{self._folder.parent} was trained without a teacher")
        if settings.train == "lora" and settings.teacher_lora is None:
            return self._base
        initial = open_initial(self._assembly, {**(self._record or {}), "path": self._base_path})
        frozen, _ = freeze(self._assembly, initial, self._record)
        return teacher_weights(frozen)
