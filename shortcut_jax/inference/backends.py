"""What `sample` can sample, behind one interface: a training run, and a converted pipeline."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import numpy as np

from shortcut_jax.cluster.distributed import say, tell
from shortcut_jax.config.bounds import MAX_IMAGES, MAX_STEPS, check_prompts, check_seed, check_whole
from shortcut_jax.core.flow import METHODS
from shortcut_jax.core.latents import PATCH
from shortcut_jax.core.schedules import Spacing, sampling_grid
from shortcut_jax.core.version import __version__
from shortcut_jax.errors import UsageError
from shortcut_jax.inference.converted_pipeline import TextToImage
from shortcut_jax.inference.image_files import Record
from shortcut_jax.inference.run_pipeline import Pipeline
from shortcut_jax.sources.models import with_strengths


class Row(NamedTuple):
    """One image: its prompt, and its noise, the `number`-th of `seed`."""

    prompt: str
    seed: int
    number: int

    @property
    def draw(self) -> tuple[int, int]:
        """As `Generator` takes it."""
        return self.seed, self.number


@dataclass(frozen=True)
class Wanted:
    """What is asked of a model.

    Attributes:
      prompts: a row of images each.
      num: images a prompt.
      steps: sampling steps.
      guidance: scale; None for the model's own.
      seed: images are number 0, 1, ... of this seed,
      seeds: or each of a prompt's images is number 0 of a seed of its own.
      method: of `METHODS`.
      shift: timestep shift; None for the model's own.
      height: in pixels; None for the model's own.
      width: in pixels; None for the model's own.
      text_tokens: of T5; None for the model's own.
    """

    prompts: tuple[str, ...]
    num: int
    steps: int
    guidance: float | None = None
    seed: int = 0
    seeds: tuple[int, ...] = ()
    method: str = "euler"
    shift: float | None = None
    height: int | None = None
    width: int | None = None
    text_tokens: int | None = None

    @property
    def rows(self) -> list[Row]:
        """The images, those of a prompt together."""
        if self.seeds:
            return [Row(prompt, seed, 0) for prompt in self.prompts for seed in self.seeds]
        return [Row(p, self.seed, i) for i, p in enumerate(p for p in self.prompts for _ in range(self.num))]

    def check(self) -> None:
        """Raises UsageError or BoundsError for what no model can do."""
        check_whole("--steps", self.steps, MAX_STEPS)
        check_whole("--num", self.num, MAX_IMAGES)
        check_prompts(self.prompts)
        if self.method not in METHODS:
            raise UsageError(f"--method is {self.method!r}, but must be {' or '.join(METHODS)}")
        if self.shift is not None and not (math.isfinite(self.shift) and self.shift > 0):
            raise UsageError(f"--shift is {self.shift:g}, but must be positive and finite")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UsageError(f"--guidance is {self.guidance:g}, but must be finite")
        for seed in (self.seed, *self.seeds):
            check_seed(seed)


class SampleModel(Protocol):
    """A model as `sample` needs it. Arguments of images are rows and a `Wanted` that has been checked."""

    batch_size: int
    spacing: Spacing

    def check(self, wanted: Wanted) -> None:
        """Raises UsageError for what this model cannot do, before weights are read."""

    def notes(self, wanted: Wanted) -> list[str]:
        """What the user should know: guidance, prompts that are cut."""

    def pictures(self, rows: Sequence[Row], wanted: Wanted) -> np.ndarray:
        """[B, h, w, c], uint8."""

    def trajectories(self, rows: Sequence[Row], wanted: Wanted) -> np.ndarray:
        """What each step aims at, and the result: [B, steps + 1, h, w, c], uint8."""

    def edit(
        self, picture_hwc: np.ndarray, source_prompt: str, rows: Sequence[Row], wanted: Wanted, **plan: Any
    ) -> Any:
        """Variants [B, h, w, c] of one image, uint8: `plan` is that of an edit, and `source_guidance`."""

    def picture_size(self, height: int, width: int, wanted: Wanted) -> tuple[int, int, int]:
        """Rows, columns and channels of the images that it edits, for one of `height` x `width` pixels."""

    def facts(self, wanted: Wanted) -> Record:
        """Size, guidance, shift and what tells the model: `height`, `width`, `guidance`, `shift`, `model`, ..."""

    def title(self, wanted: Wanted) -> str:
        """Its images in a few words."""


def record(model: SampleModel, row: Row, wanted: Wanted) -> Record:
    """What an image is made by: sampled again with it, in batches of the same size, it has the same pixels."""
    made = {"prompt": row.prompt, "seed": row.seed, "index": row.number, "steps": wanted.steps, "method": wanted.method}
    return {**made, **model.facts(wanted), "batch_size": model.batch_size, "version": __version__}


def grid_times(model: SampleModel, wanted: Wanted) -> list[float]:
    """The times at which the steps begin."""
    shift = model.facts(wanted)["shift"]
    return np.asarray(sampling_grid(wanted.steps, wanted.steps, shift, model.spacing))[:-1].tolist()


class RunModel:
    """A view of a training run; see `SampleModel`."""

    def __init__(self, options: SimpleNamespace, pictures: int):
        """Reads its weights. `pictures` are wanted, 64 of which at most are sampled at once by default.

        Raises:
          UsageError, and those of `Pipeline`.
        """
        scales = options.lora_scale or [1.0]
        if len(scales) > 1:
            raise UsageError(f"--lora_scale is given {len(scales)} times, but a workdir has one set of adapters")
        self._view, self._scale, self._name = options.view, scales[0], Path(options.workdir).resolve().name
        batch = options.batch or min(pictures, 64)
        chosen = options.view, MAX_STEPS, batch, options.base, scales[0], options.encoders
        self.pipeline = Pipeline(options.workdir, *chosen)
        self.batch_size, self.spacing = self.pipeline.generate.batch_size, self.pipeline.generate.spacing

    def check(self, wanted: Wanted) -> None:
        """See `SampleModel`."""
        height, width = self.pipeline.size
        if (wanted.height or height, wanted.width or width) != (height, width):
            raise UsageError(f"this run makes images of {height} x {width} pixels only: leave the size out")

    def notes(self, wanted: Wanted) -> list[str]:
        """See `SampleModel`."""
        guidance, classifier_free = self._guidance(wanted), "classifier-free, two evaluations a step"
        how = "through the guidance embedding" if self.pipeline.distilled_guidance else classifier_free
        lines = [] if guidance == 1.0 else [f"guidance {guidance:g}: {how}"]
        if guidance == 0 and not self.pipeline.distilled_guidance:
            lines = ["guidance 0: none, as 1 is"]
        return lines + self.pipeline.notes(wanted.prompts)

    def pictures(self, rows: Sequence[Row], wanted: Wanted) -> np.ndarray:
        """See `SampleModel`."""
        return self._draw(self.pipeline.generate, rows, wanted)

    def trajectories(self, rows: Sequence[Row], wanted: Wanted) -> np.ndarray:
        """See `SampleModel`."""
        return self._draw(self.pipeline.generate.trajectory, rows, wanted)

    def _draw(self, draw: Any, rows: Sequence[Row], wanted: Wanted) -> np.ndarray:
        options = dict(draws=[r.draw for r in rows], method=wanted.method, shift=wanted.shift)
        captions, guidance = [r.prompt for r in rows], self._guidance(wanted)
        pictures: np.ndarray = draw(self.pipeline.params, captions, wanted.steps, guidance=guidance, **options)
        return pictures

    def edit(
        self, picture_hwc: np.ndarray, source_prompt: str, rows: Sequence[Row], wanted: Wanted, **plan: Any
    ) -> Any:
        """See `SampleModel`."""
        guidance, pictures = self._guidance(wanted), np.stack([picture_hwc] * len(rows))
        plan |= {"guidance": guidance, "shift": wanted.shift, "draws": [r.draw for r in rows], "quiet": True}
        if plan["source_guidance"] is None:
            plan["source_guidance"] = guidance
        return self.pipeline.edit(pictures, source_prompt, rows[0].prompt, wanted.steps, **plan)

    def picture_size(self, height: int, width: int, wanted: Wanted) -> tuple[int, int, int]:
        """See `SampleModel`."""
        return *self.pipeline.size, self.pipeline.channels

    def facts(self, wanted: Wanted) -> Record:
        """See `SampleModel`."""
        settings, (height, width) = self.pipeline.settings, self.pipeline.size
        shift = settings.eval.shift if wanted.shift is None else wanted.shift
        told: Record = {"guidance": self._guidance(wanted), "shift": shift, "height": height, "width": width}
        told |= {"model": self._name, "objective": settings.objective, "view": self._view}
        lora_scale = self._scale if settings.train == "lora" else None
        return {**told, "checkpoint_step": self.pipeline.step, "lora_scale": lora_scale}

    def title(self, wanted: Wanted) -> str:
        """See `SampleModel`."""
        return f"{self.pipeline.settings.objective} ({self._view}, step {self.pipeline.step})"

    def _guidance(self, wanted: Wanted) -> float:
        return self.pipeline.settings.eval.guidance if wanted.guidance is None else wanted.guidance


class ConvertedModel:
    """A converted pipeline; see `SampleModel`."""

    def __init__(self, options: SimpleNamespace):
        """Opens it; weights are read on first use.

        Raises:
          UsageError, and those of `TextToImage`.
        """
        self._loras = with_strengths(options.lora, options.lora_scale)
        self._name = Path(options.checkpoint).resolve().name
        self.pipeline = TextToImage(options.checkpoint, loras=self._loras)
        self.batch_size, self.spacing = self.pipeline.rounded(options.batch), self.pipeline.sampling.spacing

    def tell(self) -> None:
        """Says what the models are."""
        for model in self.pipeline.models.values():
            say(model.origin)
            tell(model.notes)

    def check(self, wanted: Wanted) -> None:
        """See `SampleModel`."""
        options = self._options(wanted)
        try:
            self.pipeline.check(wanted.prompts or ("",), num=wanted.num, **options)
        except ValueError as error:
            raise UsageError(str(error)) from error

    def notes(self, wanted: Wanted) -> list[str]:
        """See `SampleModel`."""
        guidance = f"{self.pipeline.guidance(wanted.guidance)}; computed in {self.pipeline.compute_dtype}"
        return [guidance, *self.pipeline.cuts(wanted.prompts, wanted.text_tokens)]

    def pictures(self, rows: Sequence[Row], wanted: Wanted) -> np.ndarray:
        """See `SampleModel`."""
        return self._draw(self.pipeline, rows, wanted)

    def trajectories(self, rows: Sequence[Row], wanted: Wanted) -> np.ndarray:
        """See `SampleModel`."""
        return self._draw(self.pipeline.trajectory, rows, wanted)

    def _draw(self, draw: Any, rows: Sequence[Row], wanted: Wanted) -> np.ndarray:
        options = dict(draws=[r.draw for r in rows], method=wanted.method, batch_size=self.batch_size, quiet=True)
        pictures: np.ndarray = draw([r.prompt for r in rows], **self._options(wanted), **options)
        return pictures

    def edit(
        self, picture_hwc: np.ndarray, source_prompt: str, rows: Sequence[Row], wanted: Wanted, **plan: Any
    ) -> Any:
        """See `SampleModel`."""
        options = {k: v for k, v in self._options(wanted).items() if k not in ("height", "width")}
        pictures, draws = np.stack([picture_hwc] * len(rows)), [r.draw for r in rows]
        return self.pipeline.edit(pictures, source_prompt, rows[0].prompt, draws=draws, quiet=True, **options, **plan)

    def picture_size(self, height: int, width: int, wanted: Wanted) -> tuple[int, int, int]:
        """See `SampleModel`: the size that is asked for, or that of the image, at most about a megapixel."""
        unit = PATCH * self.pipeline.models["vae"].config.factor
        if wanted.height and wanted.width:
            return wanted.height, wanted.width, 3
        scale = min(1.0, 1024 / math.sqrt(height * width))
        return *(max(round(side * scale / unit), 1) * unit for side in (height, width)), 3

    def facts(self, wanted: Wanted) -> Record:
        """See `SampleModel`."""
        guidance, asked = self.pipeline.guidance(wanted.guidance), self._options(wanted)
        rows, columns = self.pipeline.latent_size(asked["height"], asked["width"])
        shift = self.pipeline.sampling.shift.at(rows * columns // PATCH**2) if wanted.shift is None else wanted.shift
        scale = guidance.scale if guidance.embedded is None else guidance.embedded
        told = {"guidance": scale, "shift": shift, "height": asked["height"], "width": asked["width"]}
        loras = [[Path(path).name, scale] for path, scale in self._loras]
        return {**told, "text_tokens": wanted.text_tokens, "model": self._name, "lora": loras}

    def title(self, wanted: Wanted) -> str:
        """See `SampleModel`."""
        asked = self._options(wanted)
        return f"{asked['height']} x {asked['width']}"

    def _options(self, wanted: Wanted) -> dict[str, Any]:
        size = {"height": wanted.height or 1024, "width": wanted.width or 1024}
        told = {"steps": wanted.steps, "guidance": wanted.guidance, "shift": wanted.shift}
        return {**told, **size, "text_tokens": wanted.text_tokens}
