"""What is judged: a training run or a converted pipeline, as captions, images for them, and measures of its field."""

import dataclasses
import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from shortcut_jax.cluster.distributed import tell
from shortcut_jax.config.bounds import is_unguided
from shortcut_jax.config.derive import objective_settings, sampling_spacing
from shortcut_jax.core.schedules import sampling_grid
from shortcut_jax.core.straightness import PATH_STEPS, PathMeasures, measure_path
from shortcut_jax.core.types import Condition
from shortcut_jax.data.records import with_images
from shortcut_jax.errors import ConfigError
from shortcut_jax.evaluation.captions import CaptionBatch, CaptionedSet
from shortcut_jax.evaluation.validation import Validation
from shortcut_jax.inference.converted_pipeline import TextToImage
from shortcut_jax.inference.generator import Caption, Generator
from shortcut_jax.inference.run_pipeline import Pipeline
from shortcut_jax.inference.sheets import grid_captions
from shortcut_jax.run.assembly import Assembly
from shortcut_jax.runtime.sharding import replicated
from shortcut_jax.steps.networks import TEACHER, VIEWS, guided, make_velocity
from shortcut_jax.steps.objectives import row_group
from shortcut_jax.steps.sampling import draw_noise

PATH_ROWS = 32
"""Paths that the field is measured on."""

CHECKPOINT = "checkpoint"
"""The one view of a converted pipeline."""


class Subject(Protocol):
    """What is judged.

    Attributes:
      name: of it, short.
      views: names of its sets of weights.
      batch_size: images made at once.
      step: the training step of a run.
      facts: for the page, by name.
      identity: all that its images depend on beside view, steps, seed and caption, as text.
    """

    name: str
    views: tuple[str, ...]
    batch_size: int
    step: int | None
    facts: dict[str, str]
    identity: str

    def weights(self, view: str) -> Any:
        """Weights of a view, on devices."""

    def __len__(self) -> int:
        """How many captions there are."""

    def ask(self, indices: Sequence[int], total: int) -> CaptionBatch:
        """The captions of images `indices` of `total`."""

    def show(self, num: int) -> CaptionBatch:
        """Captions to show images of, different ones where there are."""

    def images(self, weights: Any, asked: CaptionBatch, steps: int, seed: int, first: int) -> np.ndarray:
        """Images [S, h, w, c], uint8, for at most `batch_size` captions; noise `first` ... of a seed."""

    def few(self, weights: Any, asked: CaptionBatch, steps: int, seed: int) -> np.ndarray:
        """The same for a few captions, all in one batch of their own, noise 0 ... of a seed."""

    def path(self, weights: Any, seed: int) -> PathMeasures | None:
        """The field along its own paths from `batch_size` noises; None where it is not measured."""

    def validate(self, weights: Any) -> dict[str, float]:
        """The loss on held-out images, and by time below it; empty where there are none."""


class RunSubject:
    """A training workdir; see `Subject`. Captions are those of its training set, evenly spread."""

    def __init__(
        self,
        workdir: str | Path,
        max_steps: int,
        batch_size: int,
        guidance: float | None = None,
        shift: float | None = None,
        base: str | None = None,
        encoders: str | None = None,
        data_dir: str | None = None,
    ):
        """Opens the newest checkpoint and the training set.

        Raises:
          CheckpointError, ConfigError, DataError: see `Pipeline` and `TrainingData`.
        """
        self.pipeline = Pipeline(workdir, "slow", max_steps, batch_size, base, encoders=encoders)
        s = self.pipeline.settings
        self.name = Path(workdir).resolve().name
        self.step: int | None = self.pipeline.step
        self.views: tuple[str, ...] = (*VIEWS, TEACHER) if s.has_base else VIEWS
        self.guidance = s.eval.guidance if guidance is None else guidance
        self.shift = s.eval.shift if shift is None else shift
        self._generators: dict[int, Generator] = {}
        self.batch_size = self._generator(batch_size).batch_size
        # A run on a part of a set is judged by the whole of it.
        data = dataclasses.replace(s.data, dir=data_dir or s.data.dir, mix=(), weights=(), caption_dropout=0.0, limit=0)
        self.data = with_images(data) or data
        self.facts = {
            "run": f"{workdir}: {s.objective}, step {self.step:,} of {s.steps:,}, global batch {s.batch_size}",
            "network": f"{s.model.preset}, {s.train} trained",
            "data": f"{s.data.name} ({s.data.split}), images of {s.data.height} x {s.data.width}"
            + (f"; {s.data.limit:,} of them were trained on" if s.data.limit else ""),
        }
        self.identity = f"{Path(workdir).resolve()} step {self.step} guidance {self.guidance:g} shift {self.shift:g}"

    @cached_property
    def captioned(self) -> "CaptionedSet":
        """The training set."""
        return CaptionedSet(self.pipeline, self.data)

    def weights(self, view: str) -> Any:
        """See `Subject`."""
        return self.pipeline.params if view == "slow" else self.pipeline.weights(view)

    def __len__(self) -> int:
        return len(self.captioned)

    def ask(self, indices: Sequence[int], total: int) -> CaptionBatch:
        """See `Subject`."""
        return self.captioned.ask(indices, total)

    def show(self, num: int) -> CaptionBatch:
        """See `Subject`."""
        chosen = grid_captions(self.pipeline.settings.eval.captions, self.captioned.captions(256), num)
        return CaptionBatch(chosen)

    def images(self, weights: Any, asked: CaptionBatch, steps: int, seed: int, first: int) -> np.ndarray:
        """See `Subject`."""
        return self._draw(self.batch_size, weights, asked, steps, seed, first)

    def few(self, weights: Any, asked: CaptionBatch, steps: int, seed: int) -> np.ndarray:
        """See `Subject`."""
        return self._draw(len(asked.captions), weights, asked, steps, seed, 0)

    def _draw(self, batch: int, weights: Any, asked: CaptionBatch, steps: int, seed: int, first: int) -> np.ndarray:
        draws = [(seed, first + i) for i in range(len(asked.captions))]
        return self._generator(batch)(weights, self._texts(asked), steps, guidance=self.guidance, draws=draws)

    def _texts(self, asked: CaptionBatch) -> Sequence[Caption]:
        """Stored states are those of T5 and CLIP: for a network that reads them."""
        return asked.states if asked.states and self.data.text_encoder == "stored" else asked.captions

    def _generator(self, batch: int) -> Generator:
        if batch not in self._generators:
            steps, codec = self.pipeline.generate.max_steps, self.pipeline.codec
            self._generators[batch] = Generator(self.pipeline.assembly, batch, steps, self.shift, codec)
        return self._generators[batch]

    def path(self, weights: Any, seed: int) -> PathMeasures | None:
        """See `Subject`."""
        generator, cfg = self._generator(PATH_ROWS), self.pipeline.assembly.model
        rows = generator.batch_size
        args = [generator.condition(self._texts(self.ask(range(rows), rows)), self.guidance)]
        if not (is_unguided(self.guidance) or cfg.guidance):
            args.append(generator.condition([""] * rows, self.guidance))
        with jax.set_mesh(self.pipeline.assembly.mesh):
            return self._path(weights, seed, *args)

    @cached_property
    def _path(self) -> Any:
        assembly = self.pipeline.assembly
        cfg, size = assembly.model, assembly.latent_size
        velocity_of = make_velocity(cfg, *size)
        times = sampling_grid(PATH_STEPS, PATH_STEPS, self.shift, sampling_spacing(assembly.settings))

        def path(weights: Any, seed: Any, condition: Condition, empty: Condition | None = None) -> PathMeasures:
            velocity = velocity_of(weights, condition)
            if empty is not None:
                velocity = guided(velocity, velocity_of(weights, empty), self.guidance)
            return measure_path(velocity, draw_noise(seed, 0, len(condition.vec_BV), cfg, *size), times)

        return jax.jit(path, out_shardings=replicated(assembly.mesh))

    def validate(self, weights: Any) -> dict[str, float]:
        """See `Subject`. Of the run's validation set, or else of its own data, which the name then tells."""
        settings = self.pipeline.settings.validation
        return self._validation(weights, f"{settings.rule} loss{'' if settings.interval(1) else ' (training images)'}")

    @cached_property
    def _validation(self) -> Validation:
        s = self.pipeline.settings
        v = s.validation
        if not v.interval(1):
            v = dataclasses.replace(v, name=self.data.name, split=self.data.split, images=2048)
        assembly = self.pipeline.assembly
        unit = row_group(objective_settings(s)).size * assembly.mesh_shape.batch_shards
        rows = -(-self.batch_size // unit) * unit
        changed = dataclasses.replace(
            s, validation=v, data=self.data, batch_size=rows, batch_per_device=None, accumulate=1
        )
        return Validation(Assembly(changed))


class ConvertedSubject:
    """A converted pipeline on a list of prompts; see `Subject`."""

    def __init__(
        self,
        folder: str,
        prompts: Sequence[str],
        batch_size: int,
        options: dict[str, Any],
        loras: Sequence[tuple[str, float]] = (),
    ):
        """Opens it.

        Args:
          folder: of `shortcut_jax.convert`.
          prompts: none for a teacher, which is asked for the captions of its students.
          batch_size: rounded up to the devices.
          options: `height`, `width`, `guidance`, `shift`, `text_tokens`, each None for the pipeline's own.
          loras: adapters and their strengths.

        Raises:
          ConvertedError: see `TextToImage`.
          ConfigError: sizes or numbers that it does not take.
        """
        self._model = TextToImage(folder, loras=loras)
        tell(self._model.models["flux"].notes)
        self._options = {name: value for name, value in options.items() if value is not None}
        self._options = {"height": 1024, "width": 1024, **self._options}
        self._prompts = list(prompts)
        try:
            self._model.check(self._prompts or [""], **self._options)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.name = Path(folder).resolve().name
        self.step: int | None = None
        self.views: tuple[str, ...] = (CHECKPOINT,)
        self.batch_size = self._model.rounded(batch_size)
        size = f"{self._options['height']} x {self._options['width']}"
        self.facts = {
            "pipeline": f"{folder}: {self._model.models['flux'].origin}",
            "prompts": f"{len(self._prompts)}, images of {size}",
            "guidance": str(self._model.guidance(self._options.get("guidance"))),
        }
        content = hashlib.sha256(repr(self._prompts).encode()).hexdigest()
        self.identity = f"{Path(folder).resolve()} {self._options} {list(loras)} prompts {content[:16]}"

    def weights(self, view: str) -> Any:
        """See `Subject`; they are read on first use."""
        return None

    def __len__(self) -> int:
        return len(self._prompts)

    def show(self, num: int) -> CaptionBatch:
        """See `Subject`."""
        return self.ask(range(num), num)

    def ask(self, indices: Sequence[int], total: int) -> CaptionBatch:
        """See `Subject`."""
        return CaptionBatch([self._prompts[i % len(self._prompts)] for i in indices])

    def images(self, weights: Any, asked: CaptionBatch, steps: int, seed: int, first: int) -> np.ndarray:
        """See `Subject`."""
        draws = [(seed, first + i) for i in range(len(asked.captions))]
        return self._model(asked.captions, steps, draws=draws, batch_size=self.batch_size, **self._options)

    def few(self, weights: Any, asked: CaptionBatch, steps: int, seed: int) -> np.ndarray:
        """See `Subject`."""
        return self._model(asked.captions, steps, seed=seed, batch_size=len(asked.captions), **self._options)

    def path(self, weights: Any, seed: int) -> PathMeasures | None:
        """See `Subject`."""
        return None

    def validate(self, weights: Any) -> dict[str, float]:
        """See `Subject`."""
        return {}
