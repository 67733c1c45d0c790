"""What is judged: a training run or a converted pipeline, as captions, pictures for them, and measures of its field."""

import dataclasses
import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from shortcut_jax.assemble import Assembly
from shortcut_jax.check_data import check_data
from shortcut_jax.core.paths import PATH_STEPS, PathMeasures, measure_path
from shortcut_jax.core.schedules import sampling_grid
from shortcut_jax.core.types import Condition
from shortcut_jax.data.pipeline import Draw, RowMaker, read_many
from shortcut_jax.data.records import data_folder
from shortcut_jax.data.training import TrainingData
from shortcut_jax.generate import Generator
from shortcut_jax.pipeline import Pipeline
from shortcut_jax.report import grid_captions
from shortcut_jax.resolve import objective_settings
from shortcut_jax.runtime.sharding import replicated
from shortcut_jax.settings import ConfigError
from shortcut_jax.steps.objectives import row_group
from shortcut_jax.steps.sampling import draw_noise
from shortcut_jax.steps.views import TEACHER, VIEWS, guided, make_velocity
from shortcut_jax.text_to_image import TextToImage
from shortcut_jax.validation import Validation, hash_of

PATH_ROWS = 32
"""Paths that the field is measured on."""

CHECKPOINT = "checkpoint"
"""The one view of a converted pipeline."""


class Asked(NamedTuple):
    """Captions that pictures are made for.

    Attributes:
      captions: as text.
      labels: the class of each, where the data has classes.
    """

    captions: list[str]
    labels: np.ndarray | None = None


class Subject(Protocol):
    """What is judged.

    Attributes:
      name: of it, short.
      views: names of its sets of weights.
      batch_size: pictures made at once.
      step: the training step of a run.
      facts: for the page, by name.
      identity: all that its pictures depend on beside view, steps, seed and caption, as text.
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

    def ask(self, indices: Sequence[int], total: int) -> Asked:
        """The captions of pictures `indices` of `total`."""

    def show(self, num: int) -> Asked:
        """Captions to show pictures of, different ones where there are."""

    def pictures(self, weights: Any, asked: Asked, steps: int, seed: int, first: int) -> np.ndarray:
        """Pictures [S, h, w, c], uint8, for at most `batch_size` captions; noise `first` ... of a seed."""

    def few(self, weights: Any, asked: Asked, steps: int, seed: int) -> np.ndarray:
        """The same for a few captions, all in one batch of their own, noise 0 ... of a seed."""

    def path(self, weights: Any, seed: int) -> PathMeasures | None:
        """The field along its own paths from `batch_size` noises; None where it is not measured."""

    def validate(self, weights: Any) -> dict[str, float]:
        """The loss on held-out pictures, and by time below it; empty where there are none."""


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
        self._known: dict[str, Any] = {}
        self._generators: dict[int, Generator] = {}
        self.batch_size = self._generator(batch_size).batch_size
        self.data = dataclasses.replace(s.data, dir=data_dir or s.data.dir, mix=(), weights=(), caption_dropout=0.0)
        self.facts = {
            "run": f"{workdir}: {s.objective}, step {self.step:,} of {s.steps:,}, global batch {s.batch_size}",
            "network": f"{s.model.preset}, {s.train} trained",
            "data": f"{s.data.name} ({s.data.split}), pictures of {s.data.height} x {s.data.width}",
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

    def ask(self, indices: Sequence[int], total: int) -> Asked:
        """See `Subject`."""
        asked, states = self.captioned.ask(indices, total)
        self._known = dict(zip(asked.captions, states, strict=True))
        return asked

    def show(self, num: int) -> Asked:
        """See `Subject`."""
        chosen = grid_captions(self.pipeline.settings.eval.captions, self.captioned.captions(256), num)
        return Asked(chosen)

    def pictures(self, weights: Any, asked: Asked, steps: int, seed: int, first: int) -> np.ndarray:
        """See `Subject`."""
        return self._draw(self.batch_size, weights, asked, steps, seed, first)

    def few(self, weights: Any, asked: Asked, steps: int, seed: int) -> np.ndarray:
        """See `Subject`."""
        return self._draw(len(asked.captions), weights, asked, steps, seed, 0)

    def _draw(self, batch: int, weights: Any, asked: Asked, steps: int, seed: int, first: int) -> np.ndarray:
        draws = [(seed, first + i) for i in range(len(asked.captions))]
        return self._generator(batch)(weights, asked.captions, steps, guidance=self.guidance, draws=draws)

    def _generator(self, batch: int) -> Generator:
        if batch not in self._generators:
            ends = self.pipeline.ends._replace(encode=self._encode)
            steps = self.pipeline.generate.max_steps
            self._generators[batch] = Generator(self.pipeline.assembly, batch, steps, self.shift, ends)
        return self._generators[batch]

    def _encode(self, caption: str) -> Any:
        """Text states as they are stored with the set, where the caption is from there."""
        return self._known[caption] if caption in self._known else self.pipeline.ends.encode(caption)

    def path(self, weights: Any, seed: int) -> PathMeasures | None:
        """See `Subject`."""
        generator, cfg = self._generator(PATH_ROWS), self.pipeline.assembly.model
        rows = generator.batch_size
        args = [generator.condition(self.ask(range(rows), rows).captions, self.guidance)]
        if self.guidance != 1.0 and not cfg.guidance:
            args.append(generator.condition([""] * rows, self.guidance))
        with jax.set_mesh(self.pipeline.assembly.mesh):
            return self._path(weights, seed, *args)

    @cached_property
    def _path(self) -> Any:
        assembly = self.pipeline.assembly
        cfg, size = assembly.model, assembly.latent_size
        velocity_of = make_velocity(cfg, *size)
        times = sampling_grid(PATH_STEPS, PATH_STEPS, self.shift)

        def path(weights: Any, seed: Any, condition: Condition, empty: Condition | None = None) -> PathMeasures:
            velocity = velocity_of(weights, condition)
            if empty is not None:
                velocity = guided(velocity, velocity_of(weights, empty), self.guidance)
            return measure_path(velocity, draw_noise(seed, 0, len(condition.vec_BV), cfg, *size), times)

        return jax.jit(path, out_shardings=replicated(assembly.mesh))

    def validate(self, weights: Any) -> dict[str, float]:
        """See `Subject`. Of the run's validation set, or else of its own data, which the name then tells."""
        rule, on = self.pipeline.settings.validation.rule, self._validation
        values = on(weights, "loss") if on else {}
        where = "" if self.pipeline.settings.validation.interval(1) else " (training pictures)"
        return {name.replace("loss", f"{rule} loss{where}", 1): value for name, value in values.items()}

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


class CaptionedSet:
    """The pictures and captions of a run's training set that have the size of its samples."""

    def __init__(self, pipeline: Pipeline, settings: Any):
        """Opens the set. Raises DataError where it is not there, ConfigError where it is not the run's."""
        self._data = TrainingData(settings)
        check_data(pipeline.settings, pipeline.assembly.model, self._data)
        size = settings.height, settings.width
        self._index = self._data.places[self._data.buckets.index(size)][0]
        self._records = self._data.sets[0].records
        self._to_row, self._ends = RowMaker(self._data, pipeline.ends.encode), pipeline.ends
        facts = (data_folder(settings), settings.split, settings.limit, len(self._index), size)
        self.identity = " ".join(map(str, facts))

    def __len__(self) -> int:
        return len(self._index)

    def ask(self, indices: Sequence[int], total: int) -> tuple[Asked, list[tuple[np.ndarray, np.ndarray]]]:
        """See `Subject.ask`, and the text states: evenly over the set, or again from its beginning beyond its end."""
        size = len(self._index)
        picks = [i * size // total if total < size else i % size for i in indices]
        records, draws = self._read(picks)
        rows = [self._to_row(record, draw) for record, draw in zip(records, draws, strict=True)]
        captions = [record["caption"].decode("utf-8") for record in records]
        labels = np.array([r["label"] for r in records]) if "label" in records[0] else None
        return Asked(captions, labels), [(row.txt_BMT, row.vec_BV) for row in rows]

    def pictures(self, indices: Sequence[int]) -> np.ndarray:
        """Pictures of the set, uint8, as the run sees them: those of latents are decoded."""
        records, draws = self._read(indices)
        latents = [self._to_row(record, draw).latents_BhwC for record, draw in zip(records, draws, strict=True)]
        return self._ends.decode(np.stack(latents))

    def captions(self, num: int) -> list[str]:
        """See `TrainingData.captions`."""
        return self._data.captions(num)

    @property
    def records(self) -> Sequence[dict[str, Any]]:
        """The records, in storage order."""
        return self._records

    def _read(self, indices: Sequence[int]) -> tuple[list[dict[str, Any]], list[Draw]]:
        places = [int(self._index[i]) for i in indices]
        draws = [Draw(0, place, drop=False, flip=False, seed=hash_of(0, place)) for place in places]
        return read_many(self._records, places), draws


class ConvertedSubject:
    """A converted pipeline on a list of prompts; see `Subject`."""

    def __init__(self, folder: str, prompts: Sequence[str], batch_size: int, options: dict[str, Any]):
        """Opens it.

        Args:
          folder: of `shortcut_jax.convert`.
          prompts: one or several.
          batch_size: rounded up to the devices.
          options: `height`, `width`, `guidance`, `shift`, `text_tokens`, each None for the pipeline's own, and `loras`.

        Raises:
          ConvertedError: see `TextToImage`.
          ConfigError: sizes or numbers that it does not take.
        """
        self._model = TextToImage(folder, loras=options.pop("loras", ()))
        self._options = {name: value for name, value in options.items() if value is not None}
        self._options = {"height": 1024, "width": 1024, **self._options}
        self._prompts = list(prompts)
        try:
            self._model.check(self._prompts, **self._options)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        devices = self._model.mesh.devices.size
        self.name = Path(folder).resolve().name
        self.step: int | None = None
        self.views: tuple[str, ...] = (CHECKPOINT,)
        self.batch_size = -(-batch_size // devices) * devices
        size = f"{self._options['height']} x {self._options['width']}"
        self.facts = {
            "pipeline": f"{folder}: {self._model.models['flux'].origin}",
            "prompts": f"{len(self._prompts)}, pictures of {size}",
            "guidance": str(self._model.guidance(self._options.get("guidance"))),
        }
        content = hashlib.sha256(repr(self._prompts).encode()).hexdigest()
        self.identity = f"{Path(folder).resolve()} {self._options} prompts {content[:16]}"

    def weights(self, view: str) -> Any:
        """See `Subject`; they are read on first use."""
        return None

    def __len__(self) -> int:
        return len(self._prompts)

    def show(self, num: int) -> Asked:
        """See `Subject`."""
        return self.ask(range(num), num)

    def ask(self, indices: Sequence[int], total: int) -> Asked:
        """See `Subject`."""
        return Asked([self._prompts[i % len(self._prompts)] for i in indices])

    def pictures(self, weights: Any, asked: Asked, steps: int, seed: int, first: int) -> np.ndarray:
        """See `Subject`."""
        draws = [(seed, first + i) for i in range(len(asked.captions))]
        return self._model(asked.captions, steps, draws=draws, batch_size=self.batch_size, **self._options)

    def few(self, weights: Any, asked: Asked, steps: int, seed: int) -> np.ndarray:
        """See `Subject`."""
        return self._model(asked.captions, steps, seed=seed, batch_size=len(asked.captions), **self._options)

    def path(self, weights: Any, seed: int) -> PathMeasures | None:
        """See `Subject`."""
        return None

    def validate(self, weights: Any) -> dict[str, float]:
        """See `Subject`."""
        return {}
