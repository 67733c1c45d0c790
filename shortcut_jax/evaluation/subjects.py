"""What is judged: a training run or a converted pipeline, as captions, images for them, and measures of its field."""

import dataclasses
import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

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
from shortcut_jax.inference.converted_pipeline import SIDE, TextToImage
from shortcut_jax.inference.request import Caption, ImagePipeline, Row, SampleRequest
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


class Subject:
    """What is judged: a pipeline, and the captions that it makes images for.

    Attributes:
      pipeline: that makes the images.
      request: guidance, shift and size of the images.
      name: of it, short.
      views: names of its sets of weights.
      batch_size: images made at once.
      step: the training step of a run.
      facts: for the page, by name.
      identity: all that its images depend on beside view, steps, seed and caption, as text.
    """

    pipeline: ImagePipeline
    request: SampleRequest
    name: str
    views: tuple[str, ...]
    batch_size: int
    step: int | None = None
    facts: dict[str, str]
    identity: str

    def weights(self, view: str) -> Any:
        """Weights of a view, on devices."""
        return self.pipeline.weights(view)

    def __len__(self) -> int:
        """How many captions there are."""
        raise NotImplementedError

    def ask(self, indices: Sequence[int], total: int) -> CaptionBatch:
        """The captions of images `indices` of `total`."""
        raise NotImplementedError

    def show(self, num: int) -> CaptionBatch:
        """Captions to show images of, different ones where there are."""
        raise NotImplementedError

    def texts(self, asked: CaptionBatch) -> Sequence[Caption]:
        """Captions as the pipeline reads them."""
        return asked.captions

    def images(self, weights: Any, asked: CaptionBatch, steps: int, seed: int, first: int) -> np.ndarray:
        """Images [S, h, w, c], uint8, for at most `batch_size` captions; noise `first` ... of a seed."""
        return self._drawn(self.batch_size, weights, asked, steps, seed, first)

    def few(self, weights: Any, asked: CaptionBatch, steps: int, seed: int) -> np.ndarray:
        """The same for a few captions, all in one batch of their own, noise 0 ... of a seed."""
        return self._drawn(len(asked.captions), weights, asked, steps, seed, 0)

    def _drawn(self, batch: int, weights: Any, asked: CaptionBatch, steps: int, seed: int, first: int) -> np.ndarray:
        rows = [Row(text, seed, first + i) for i, text in enumerate(self.texts(asked))]
        request = dataclasses.replace(self.request, steps=steps, batch_size=batch)
        return self.pipeline.images(rows, request, weights)

    def path(self, weights: Any, seed: int) -> PathMeasures | None:
        """The field along its own paths from some noises; None where it is not measured."""
        return None

    def validate(self, weights: Any) -> dict[str, float]:
        """The loss on held-out images, and by time below it; empty where there are none."""
        return {}


class RunSubject(Subject):
    """A training workdir; see `Subject`. Captions are those of its training set, evenly spread."""

    def __init__(
        self,
        workdir: str | Path,
        max_steps: int,
        batch_size: int,
        request: SampleRequest | None = None,
        base: str | None = None,
        encoders: str | None = None,
        data_dir: str | None = None,
    ):
        """Opens the newest checkpoint and the training set.

        Args:
          workdir: of the run.
          max_steps: the most sampling steps that will be asked for.
          batch_size: rounded up to the devices.
          request: guidance and shift, each None for the run's own, and the view that is read at once (`slow`).
          base: see `Pipeline`.
          encoders: see `Pipeline`.
          data_dir: folder of the sets; the run's own by default.

        Raises:
          CheckpointError, ConfigError, DataError: see `Pipeline` and `TrainingData`.
        """
        request = request or SampleRequest(())
        view = request.view or "slow"
        self.pipeline: Pipeline = Pipeline(workdir, view, max_steps, batch_size, base, encoders=encoders)
        s = self.pipeline.settings
        self.name, self.step = self.pipeline.name, self.pipeline.step
        self.views = (*VIEWS, TEACHER) if s.has_base else VIEWS
        self.guidance = s.eval.guidance if request.guidance is None else request.guidance
        self.shift = s.eval.shift if request.shift is None else request.shift
        self.request = SampleRequest((), guidance=self.guidance, shift=self.shift)
        self.batch_size = self.pipeline.rounded(batch_size)
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

    def __len__(self) -> int:
        return len(self.captioned)

    def ask(self, indices: Sequence[int], total: int) -> CaptionBatch:
        """See `Subject`."""
        return self.captioned.ask(indices, total)

    def show(self, num: int) -> CaptionBatch:
        """See `Subject`."""
        chosen = grid_captions(self.pipeline.settings.eval.captions, self.captioned.captions(256), num)
        return CaptionBatch(chosen)

    def texts(self, asked: CaptionBatch) -> Sequence[Caption]:
        """See `Subject`. Stored states are those of T5 and CLIP: for a network that reads them."""
        return asked.states if asked.states and self.data.text_encoder == "stored" else asked.captions

    def path(self, weights: Any, seed: int) -> PathMeasures | None:
        """See `Subject`."""
        generator, cfg = self.pipeline.generator(PATH_ROWS), self.pipeline.assembly.model
        rows = generator.batch_size
        args = [generator.condition(self.texts(self.ask(range(rows), rows)), self.guidance)]
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


class ConvertedSubject(Subject):
    """A converted pipeline on a list of prompts; see `Subject`."""

    def __init__(
        self,
        folder: str,
        prompts: Sequence[str],
        batch_size: int,
        options: dict[str, Any],
        loras: Sequence[tuple[str, float]] = (),
        matmul_dtype: str | None = None,
    ):
        """Opens it.

        Args:
          folder: of `shortcut_jax.convert`.
          prompts: none for a teacher, which is asked for the captions of its students.
          batch_size: rounded up to the devices.
          options: `height`, `width`, `guidance`, `shift`, `text_tokens`, each None for the pipeline's own.
          loras: adapters and their strengths.
          matmul_dtype: see `TextToImage`.

        Raises:
          ConvertedError: see `TextToImage`.
          ConfigError: sizes or numbers that it does not take.
        """
        self.pipeline: TextToImage = TextToImage(folder, loras=loras, matmul_dtype=matmul_dtype)
        tell(self.pipeline.models["flux"].notes)
        self.request = SampleRequest((), **options)
        self._prompts = list(prompts)
        try:
            self.pipeline.check(dataclasses.replace(self.request, prompts=tuple(self._prompts)))
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.name = self.pipeline.name
        self.views = (CHECKPOINT,)
        self.batch_size = self.pipeline.rounded(batch_size)
        self.facts = {
            "pipeline": f"{folder}: {self.pipeline.models['flux'].origin}",
            "prompts": f"{len(self._prompts)}, images of {self.pipeline.title(self.request)}",
            "guidance": str(self.pipeline.guidance(self.request.guidance)),
        }
        content = hashlib.sha256(repr(self._prompts).encode()).hexdigest()
        chosen = {"height": SIDE, "width": SIDE, **{k: v for k, v in options.items() if v is not None}}
        products = f" {matmul_dtype}" if matmul_dtype else ""
        self.identity = f"{Path(folder).resolve()} {chosen} {list(loras)} prompts {content[:16]}{products}"

    def __len__(self) -> int:
        return len(self._prompts)

    def show(self, num: int) -> CaptionBatch:
        """See `Subject`."""
        return self.ask(range(num), num)

    def ask(self, indices: Sequence[int], total: int) -> CaptionBatch:
        """See `Subject`."""
        return CaptionBatch([self._prompts[i % len(self._prompts)] for i in indices])

    def texts(self, asked: CaptionBatch) -> Sequence[Caption]:
        """See `Subject`; what is cut off them is printed once."""
        self.pipeline.tell(dataclasses.replace(self.request, prompts=tuple(asked.captions)))
        return asked.captions
