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
class SampleRequest:
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
    """A model as `sample` needs it. Arguments of images are rows and a `SampleRequest` that has been checked."""

    batch_size: int
    spacing: Spacing

    def check(self, request: SampleRequest) -> None:
        """Raises UsageError for what this model cannot do, before weights are read."""

    def notes(self, request: SampleRequest) -> list[str]:
        """What the user should know: guidance, prompts that are cut."""

    def images(self, rows: Sequence[Row], request: SampleRequest) -> np.ndarray:
        """[B, h, w, c], uint8."""

    def trajectories(self, rows: Sequence[Row], request: SampleRequest) -> np.ndarray:
        """What each step aims at, and the result: [B, steps + 1, h, w, c], uint8."""

    def edit(
        self, image_hwc: np.ndarray, source_prompt: str, rows: Sequence[Row], request: SampleRequest, **plan: Any
    ) -> Any:
        """Variants [B, h, w, c] of one image, uint8: `plan` is that of an edit, and `source_guidance`."""

    def image_size(self, height: int, width: int, request: SampleRequest) -> tuple[int, int, int]:
        """Rows, columns and channels of the images that it edits, for one of `height` x `width` pixels."""

    def facts(self, request: SampleRequest) -> Record:
        """Size, guidance, shift and what tells the model: `height`, `width`, `guidance`, `shift`, `model`, ..."""

    def title(self, request: SampleRequest) -> str:
        """Its images in a few words."""


def record(model: SampleModel, row: Row, request: SampleRequest) -> Record:
    """What an image is made by: sampled again with it, in batches of the same size, it has the same pixels."""
    made = {
        "prompt": row.prompt,
        "seed": row.seed,
        "index": row.number,
        "steps": request.steps,
        "method": request.method,
    }
    return {**made, **model.facts(request), "batch_size": model.batch_size, "version": __version__}


def grid_times(model: SampleModel, request: SampleRequest) -> list[float]:
    """The times at which the steps begin."""
    shift = model.facts(request)["shift"]
    return np.asarray(sampling_grid(request.steps, request.steps, shift, model.spacing))[:-1].tolist()


class RunModel:
    """A view of a training run; see `SampleModel`."""

    def __init__(self, options: SimpleNamespace, images: int):
        """Reads its weights. `images` are wanted, 64 of which at most are sampled at once by default.

        Raises:
          UsageError, and those of `Pipeline`.
        """
        scales = options.lora_scale or [1.0]
        if len(scales) > 1:
            raise UsageError(f"--lora_scale is given {len(scales)} times, but a workdir has one set of adapters")
        self._view, self._scale, self._name = options.view, scales[0], Path(options.workdir).resolve().name
        batch = options.batch or min(images, 64)
        chosen = options.view, MAX_STEPS, batch, options.base, scales[0], options.encoders
        self.pipeline = Pipeline(options.workdir, *chosen)
        self.batch_size, self.spacing = self.pipeline.generate.batch_size, self.pipeline.generate.spacing

    def check(self, request: SampleRequest) -> None:
        """See `SampleModel`."""
        height, width = self.pipeline.size
        if (request.height or height, request.width or width) != (height, width):
            raise UsageError(f"this run makes images of {height} x {width} pixels only: leave the size out")

    def notes(self, request: SampleRequest) -> list[str]:
        """See `SampleModel`."""
        guidance, classifier_free = self._guidance(request), "classifier-free, two evaluations a step"
        how = "through the guidance embedding" if self.pipeline.distilled_guidance else classifier_free
        lines = [] if guidance == 1.0 else [f"guidance {guidance:g}: {how}"]
        if guidance == 0 and not self.pipeline.distilled_guidance:
            lines = ["guidance 0: none, as 1 is"]
        return lines + self.pipeline.notes(request.prompts)

    def images(self, rows: Sequence[Row], request: SampleRequest) -> np.ndarray:
        """See `SampleModel`."""
        return self._draw(self.pipeline.generate, rows, request)

    def trajectories(self, rows: Sequence[Row], request: SampleRequest) -> np.ndarray:
        """See `SampleModel`."""
        return self._draw(self.pipeline.generate.trajectory, rows, request)

    def _draw(self, draw: Any, rows: Sequence[Row], request: SampleRequest) -> np.ndarray:
        options = dict(draws=[r.draw for r in rows], method=request.method, shift=request.shift)
        captions, guidance = [r.prompt for r in rows], self._guidance(request)
        images: np.ndarray = draw(self.pipeline.params, captions, request.steps, guidance=guidance, **options)
        return images

    def edit(
        self, image_hwc: np.ndarray, source_prompt: str, rows: Sequence[Row], request: SampleRequest, **plan: Any
    ) -> Any:
        """See `SampleModel`."""
        guidance, images = self._guidance(request), np.stack([image_hwc] * len(rows))
        plan |= {"guidance": guidance, "shift": request.shift, "draws": [r.draw for r in rows], "quiet": True}
        if plan["source_guidance"] is None:
            plan["source_guidance"] = guidance
        return self.pipeline.edit(images, source_prompt, rows[0].prompt, request.steps, **plan)

    def image_size(self, height: int, width: int, request: SampleRequest) -> tuple[int, int, int]:
        """See `SampleModel`."""
        return *self.pipeline.size, self.pipeline.channels

    def facts(self, request: SampleRequest) -> Record:
        """See `SampleModel`."""
        settings, (height, width) = self.pipeline.settings, self.pipeline.size
        shift = settings.eval.shift if request.shift is None else request.shift
        told: Record = {"guidance": self._guidance(request), "shift": shift, "height": height, "width": width}
        told |= {"model": self._name, "objective": settings.objective, "view": self._view}
        lora_scale = self._scale if settings.train == "lora" else None
        return {**told, "checkpoint_step": self.pipeline.step, "lora_scale": lora_scale}

    def title(self, request: SampleRequest) -> str:
        """See `SampleModel`."""
        return f"{self.pipeline.settings.objective} ({self._view}, step {self.pipeline.step})"

    def _guidance(self, request: SampleRequest) -> float:
        return self.pipeline.settings.eval.guidance if request.guidance is None else request.guidance


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

    def check(self, request: SampleRequest) -> None:
        """See `SampleModel`."""
        options = self._options(request)
        try:
            self.pipeline.check(request.prompts or ("",), num=request.num, **options)
        except ValueError as error:
            raise UsageError(str(error)) from error

    def notes(self, request: SampleRequest) -> list[str]:
        """See `SampleModel`."""
        guidance = f"{self.pipeline.guidance(request.guidance)}; computed in {self.pipeline.compute_dtype}"
        return [guidance, *self.pipeline.cuts(request.prompts, request.text_tokens)]

    def images(self, rows: Sequence[Row], request: SampleRequest) -> np.ndarray:
        """See `SampleModel`."""
        return self._draw(self.pipeline, rows, request)

    def trajectories(self, rows: Sequence[Row], request: SampleRequest) -> np.ndarray:
        """See `SampleModel`."""
        return self._draw(self.pipeline.trajectory, rows, request)

    def _draw(self, draw: Any, rows: Sequence[Row], request: SampleRequest) -> np.ndarray:
        options = dict(draws=[r.draw for r in rows], method=request.method, batch_size=self.batch_size, quiet=True)
        images: np.ndarray = draw([r.prompt for r in rows], **self._options(request), **options)
        return images

    def edit(
        self, image_hwc: np.ndarray, source_prompt: str, rows: Sequence[Row], request: SampleRequest, **plan: Any
    ) -> Any:
        """See `SampleModel`."""
        options = {k: v for k, v in self._options(request).items() if k not in ("height", "width")}
        images, draws = np.stack([image_hwc] * len(rows)), [r.draw for r in rows]
        return self.pipeline.edit(images, source_prompt, rows[0].prompt, draws=draws, quiet=True, **options, **plan)

    def image_size(self, height: int, width: int, request: SampleRequest) -> tuple[int, int, int]:
        """See `SampleModel`: the size that is asked for, or that of the image, at most about a megapixel."""
        unit = PATCH * self.pipeline.models["vae"].config.factor
        if request.height and request.width:
            return request.height, request.width, 3
        scale = min(1.0, 1024 / math.sqrt(height * width))
        return *(max(round(side * scale / unit), 1) * unit for side in (height, width)), 3

    def facts(self, request: SampleRequest) -> Record:
        """See `SampleModel`."""
        guidance, asked = self.pipeline.guidance(request.guidance), self._options(request)
        rows, columns = self.pipeline.latent_size(asked["height"], asked["width"])
        shift = self.pipeline.sampling.shift.at(rows * columns // PATCH**2) if request.shift is None else request.shift
        scale = guidance.scale if guidance.embedded is None else guidance.embedded
        told = {"guidance": scale, "shift": shift, "height": asked["height"], "width": asked["width"]}
        loras = [[Path(path).name, scale] for path, scale in self._loras]
        return {**told, "text_tokens": request.text_tokens, "model": self._name, "lora": loras}

    def title(self, request: SampleRequest) -> str:
        """See `SampleModel`."""
        asked = self._options(request)
        return f"{asked['height']} x {asked['width']}"

    def _options(self, request: SampleRequest) -> dict[str, Any]:
        size = {"height": request.height or 1024, "width": request.width or 1024}
        told = {"steps": request.steps, "guidance": request.guidance, "shift": request.shift}
        return {**told, **size, "text_tokens": request.text_tokens}
