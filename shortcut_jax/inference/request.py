"""What is asked of a model, and what a model is to `sample`, the web page and `evaluate`: one request, one protocol."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from shortcut_jax.config.bounds import MAX_BATCH, MAX_IMAGES, MAX_STEPS, check_prompts, check_seed, check_whole
from shortcut_jax.core.flow import METHODS
from shortcut_jax.core.schedules import Spacing, sampling_grid
from shortcut_jax.core.version import __version__
from shortcut_jax.errors import UsageError
from shortcut_jax.inference.image_files import Record

Caption = str | tuple[np.ndarray, np.ndarray]
"""A caption, or its text states where they are known: txt [M, T] and vec [V]."""
Draws = Sequence[tuple[int, int]]
"""(seed, number in that seed) of each image's noise."""


class Row(NamedTuple):
    """One image: its prompt, and its noise, the `number`-th of `seed`."""

    prompt: Caption
    seed: int
    number: int

    @property
    def draw(self) -> tuple[int, int]:
        """Its noise, as `Draws` has it."""
        return self.seed, self.number


@dataclass(frozen=True, eq=False)
class Edit:
    """An image that is changed from what one prompt says to what another says (FlowEdit); see `steps.editing`.

    Attributes:
      pixels_hwc: of the image, uint8, of a size that the model makes.
      source_prompt: what it shows.
      skip: first steps that are left out.
      plain: last steps that only follow the prompt.
      average: noises a step.
      source_guidance: guidance scale for the source prompt; that of the request by default.
    """

    pixels_hwc: np.ndarray
    source_prompt: str
    skip: int = 0
    plain: int = 0
    average: int = 1
    source_guidance: float | None = None

    @property
    def plan(self) -> dict[str, int]:
        """What `make_plan` takes besides the steps."""
        return {"skip": self.skip, "plain": self.plain, "average": self.average}


@dataclass(frozen=True)
class SampleRequest:
    """What is asked of a model. None stands for the model's own.

    Attributes:
      prompts: a row of images each.
      num: images a prompt.
      steps: sampling steps.
      guidance: guidance scale.
      seed: images are number 0, 1, ... of this seed,
      seeds: or each of a prompt's images is number 0 of a seed of its own.
      method: of `METHODS`.
      shift: timestep shift.
      height: in pixels.
      width: in pixels.
      text_tokens: of T5.
      view: which weights of a run.
      lora_scale: strength of the adapters that a model keeps beside its weights.
      batch_size: images sampled at once, rounded up to the devices.
      edit: the image to change, in place of images from noise.
    """

    prompts: tuple[str, ...]
    num: int = 1
    steps: int = 4
    guidance: float | None = None
    seed: int = 0
    seeds: tuple[int, ...] = ()
    method: str = "euler"
    shift: float | None = None
    height: int | None = None
    width: int | None = None
    text_tokens: int | None = None
    view: str | None = None
    lora_scale: float | None = None
    batch_size: int | None = None
    edit: Edit | None = None

    @property
    def rows(self) -> list[Row]:
        """The images, those of a prompt together."""
        if self.seeds:
            return [Row(prompt, seed, 0) for prompt in self.prompts for seed in self.seeds]
        return [Row(p, self.seed, i) for i, p in enumerate(p for p in self.prompts for _ in range(self.num))]

    def rows_of(self, draws: Draws | None) -> list[Row]:
        """The images of a checked request with the noise that `draws` names, or else their own.

        Raises:
          ValueError: another number of them than of images, or a seed or number that does not fit its bits.
        """
        if draws is None:
            return self.rows
        texts = [row.prompt for row in self.rows]
        return [Row(p, *d) for p, d in zip(texts, numbered(draws, self.seed, len(texts)), strict=True)]

    @property
    def texts(self) -> tuple[str, ...]:
        """All prompts that the model reads."""
        return self.prompts if self.edit is None else (self.edit.source_prompt, *self.prompts)

    def check(self, prefix: str = "--") -> None:
        """Raises UsageError or BoundsError for what no model can do; `prefix` is put before the names of its fields."""
        check_whole(f"{prefix}steps", self.steps, MAX_STEPS)
        check_whole(f"{prefix}num", self.num, MAX_IMAGES)
        check_prompts(self.texts)
        if self.batch_size is not None:
            check_whole("--batch" if prefix else "batch_size", self.batch_size, MAX_BATCH)
        if self.method not in METHODS:
            raise UsageError(f"{prefix}method is {self.method!r}, but must be {' or '.join(METHODS)}")
        if self.shift is not None and not (math.isfinite(self.shift) and self.shift > 0):
            raise UsageError(f"{prefix}shift is {self.shift:g}, but must be positive and finite")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UsageError(f"{prefix}guidance is {self.guidance:g}, but must be finite")
        for seed in (self.seed, *self.seeds):
            check_seed(seed)


class Guidance(NamedTuple):
    """How a guidance scale acts.

    Attributes:
      embedded: what the guidance embedding is fed; None for a model without one.
      scale: of classifier-free guidance against the empty prompt, at two evaluations a step; 1 for none.
    """

    embedded: float | None
    scale: float

    @property
    def value(self) -> float:
        """The scale, however it acts."""
        return self.scale if self.embedded is None else self.embedded

    def __str__(self) -> str:
        if self.embedded is not None:
            return f"guidance {self.embedded:g}: through the guidance embedding"
        if self.scale == 1.0:
            return "guidance: none"
        return f"guidance {self.scale:g}: classifier-free, two evaluations a step"


class ModelLimits(NamedTuple):
    """What a model can be asked for.

    Attributes:
      title: what it is, in a few words.
      facts: more of the same, short phrases.
      height: of an image in pixels, by default or always.
      width: of an image in pixels.
      any_size: whether another size may be asked for.
      size_unit: what sizes are multiples of.
      guidance: how the default scale acts.
      views: weights to choose from, the default first; none where there is one set only.
      adapters: whether there are adapters whose strength can be chosen.
      at_once: images of a batch where several are asked for; None for one a device.
      examples: prompts to begin with.
    """

    title: str
    facts: tuple[str, ...]
    height: int
    width: int
    any_size: bool = False
    size_unit: int = 1
    guidance: Guidance = Guidance(None, 1.0)
    views: tuple[str, ...] = ()
    adapters: bool = False
    at_once: int | None = None
    examples: tuple[str, ...] = ()


class ImagePipeline(Protocol):
    """A training run or a converted pipeline, as `sample`, the web page and `evaluate` need it.

    Attributes:
      name: of it, short.
      spacing: of its sampling grids.
    """

    name: str

    @property
    def spacing(self) -> Spacing:
        """See above."""

    @property
    def limits(self) -> ModelLimits:
        """What it can be asked for."""

    def rounded(self, batch_size: int | None) -> int:
        """A batch size that divides over the devices; None for the default."""

    def check(self, request: SampleRequest) -> None:
        """Raises ValueError and UserError, before weights are read, for what this model cannot do."""

    def notes(self, request: SampleRequest) -> list[str]:
        """What the user should know: how guidance acts, and the `prompt_notes`."""

    def prompt_notes(self, request: SampleRequest) -> list[str]:
        """What the user should know of the prompts, such as what is cut off them."""

    def weights(self, view: str | None = None) -> Any:
        """The weights of a view on devices, for `images`; read on first use."""

    def images(self, rows: Sequence[Row], request: SampleRequest, weights: Any = None) -> np.ndarray:
        """Images [B, h, w, c], uint8, in batches (edits of a converted pipeline: all at once). Prints nothing.

        `weights` are those of `request.view` by default.
        """

    def trajectories(self, rows: Sequence[Row], request: SampleRequest, weights: Any = None) -> np.ndarray:
        """What each step aims at, and the result: [B, steps + 1, h, w, c], uint8."""

    def image_size(self, height: int, width: int, request: SampleRequest) -> tuple[int, int, int]:
        """Rows, columns and channels of the images that it edits, for one of `height` x `width` pixels."""

    def guidance(self, scale: float | None = None) -> Guidance:
        """How a scale acts in this model."""

    def facts(self, request: SampleRequest) -> Record:
        """Size, guidance, shift and the model: `height`, `width`, `guidance`, `shift`, `model`, ..."""

    def title(self, request: SampleRequest) -> str:
        """Its images in a few words."""


def record(model: ImagePipeline, row: Row, request: SampleRequest) -> Record:
    """What an image is made by: sampled again with it, in batches of the same size, it has the same pixels."""
    made: Record = {"prompt": row.prompt, "seed": row.seed, "index": row.number}
    made |= {"steps": request.steps, "method": request.method, **model.facts(request)}
    made |= {"batch_size": model.rounded(request.batch_size), "version": __version__}
    if (edit := request.edit) is not None:
        source = made["guidance"] if edit.source_guidance is None else edit.source_guidance
        made |= {"source_prompt": edit.source_prompt, **edit.plan, "source_guidance": source}
    return made


def grid_times(model: ImagePipeline, request: SampleRequest) -> list[float]:
    """The times at which the steps begin."""
    shift = model.facts(request)["shift"]
    return np.asarray(sampling_grid(request.steps, request.steps, shift, model.spacing))[:-1].tolist()


def nearest_multiple(side: float, unit: int) -> int:
    """The multiple of `unit` next to a side in pixels, at least `unit` itself."""
    return max(round(side / unit), 1) * unit


def numbered(draws: Draws | None, seed: int, num: int) -> Draws:
    """The draws of `num` images: as given, or the first ones of a seed.

    Raises:
      ValueError: another number of them, or a seed or number that does not fit its bits.
    """
    if draws is None:
        seed = check_seed(seed)
        return [(seed, i) for i in range(num)]
    if len(draws) != num:
        raise ValueError(f"there are {len(draws)} draws for {num} images, but it must be one for each")
    return [(check_seed(seed), check_whole("the number of a draw", i, 2**31 - 1, 0)) for seed, i in draws]
