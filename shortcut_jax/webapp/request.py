"""What a visitor of the web page may ask for: the bounds of a model, and requests that are checked against them."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from shortcut_jax.core.flow import METHODS
from shortcut_jax.errors import RequestError

MAX_STEPS = 64
MAX_IMAGES = 16
MAX_PROMPT = 1000
MAX_SEED = 2**31 - 1
MAX_GUIDANCE = 30.0
MAX_LORA_SCALE = 4.0
MAX_SHIFT = 20.0
SIZE_UNIT = 16
"""Bounds of every request: steps, images, characters, seeds from 0, scales, and what sizes are multiples of."""

FIELDS = {
    "prompt": f"what the images show, at most {MAX_PROMPT:,} characters",
    "steps": f"sampling steps, 1 to {MAX_STEPS}",
    "num": f"how many images, 1 to {MAX_IMAGES}",
    "seed": "of the noise: the same seed gives the same images",
    "guidance": "guidance scale",
    "view": "weights: online, or their fast or slow EMA",
    "lora_scale": f"strength of the LoRA, {-MAX_LORA_SCALE:g} to {MAX_LORA_SCALE:g}; 0 is the base model",
    "height": f"of an image in pixels, a multiple of {SIZE_UNIT}",
    "width": f"of an image in pixels, a multiple of {SIZE_UNIT}",
    "method": f"{' or '.join(METHODS)}; Heun's method evaluates the model twice a step",
    "shift": f"timestep shift up to {MAX_SHIFT:g}; 0 for the model's own",
}
"""What a request consists of, in the order in which the page sends it, with what each field means."""

EDIT_FIELDS = {
    "image": "the image to edit: PNG, JPEG, WebP, GIF, BMP or TIFF",
    "source_prompt": "what the image shows now",
    "prompt": "what it shall show",
    "steps": f"steps of the whole grid, 1 to {MAX_STEPS}",
    "skip": "first steps that are left out: the more, the closer to the image",
}
"""The fields that an edit adds, or that mean something else in it."""


class ModelLimits(NamedTuple):
    """What a model can be asked for.

    Attributes:
      title: what it is, in a few words.
      facts: more of the same, short phrases.
      height: of an image in pixels, by default or always.
      width: of an image in pixels.
      max_size: the longest side that may be asked for; 0 where the size is fixed.
      guidance: the scale by default.
      min_guidance: the least scale.
      guidance_means: what it does in this model.
      views: weights to choose from, the default first; none where there is one set only.
      adapters: whether there are adapters whose strength can be chosen.
      examples: prompts to begin with.
    """

    title: str
    facts: tuple[str, ...]
    height: int
    width: int
    max_size: int = 0
    guidance: float = 1.0
    min_guidance: float = 0.0
    guidance_means: str = ""
    views: tuple[str, ...] = ()
    adapters: bool = False
    examples: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a request that this model leaves open, in the order of `FIELDS`."""
        fixed: dict[str, bool] = {"view": not self.views, "lora_scale": not self.adapters}
        fixed |= dict.fromkeys(("height", "width"), not self.max_size)
        return tuple(name for name in FIELDS if not fixed.get(name))


@dataclass(frozen=True, eq=False)
class Edit:
    """An image that is changed from what one prompt says to what another says (FlowEdit).

    Attributes:
      pixels_hwc: of the image, uint8, of the size of the request.
      source_prompt: what it shows.
      skip: first steps that are left out.
    """

    pixels_hwc: np.ndarray
    source_prompt: str
    skip: int


@dataclass(frozen=True)
class Request:
    """A request within the bounds of a model; `make_request` makes it.

    Attributes:
      prompt: what the images shall show.
      steps: sampling steps.
      num: images.
      seed: of the noise.
      guidance: guidance scale.
      view: online, fast or slow; empty where there is no choice.
      lora_scale: strength of the adapters.
      height: in pixels.
      width: in pixels.
      method: of sampling.
      shift: timestep shift; None for the model's own.
      edit: the image to edit; None where images are sampled from noise.
    """

    prompt: str
    steps: int
    num: int
    seed: int
    guidance: float
    view: str
    lora_scale: float
    height: int
    width: int
    method: str = "euler"
    shift: float | None = None
    edit: Edit | None = None


def make_request(offer: ModelLimits, values: Mapping[str, Any]) -> Request:
    """Checks what came from outside, of whatever type it is.

    Args:
      offer: of the model.
      values: by the names of `FIELDS`; what is missing is the default.

    Raises:
      RequestError: a value is out of bounds or of another type, or no choice of this model.
    """
    for name in values:
        if name not in offer.fields:
            raise RequestError(f"{name} cannot be chosen for this model")
    get = values.get
    view = _choice("view", get("view", offer.views[0]), offer.views) if offer.views else ""
    return Request(
        _prompt(get("prompt")),
        _whole("steps", get("steps", 4), 1, MAX_STEPS),
        _whole("num", get("num", 4), 1, MAX_IMAGES),
        _whole("seed", get("seed", 0), 0, MAX_SEED),
        _guidance(get("guidance", offer.guidance), offer.min_guidance),
        view,
        _number("lora_scale", get("lora_scale", 1.0), -MAX_LORA_SCALE, MAX_LORA_SCALE),
        _size("height", values, offer.height, offer.max_size),
        _size("width", values, offer.width, offer.max_size),
        _choice("method", get("method", "euler"), tuple(METHODS)),
        _number("shift", get("shift", 0), 0.0, MAX_SHIFT) or None,
    )


def make_edit(offer: ModelLimits, values: Mapping[str, Any], pixels_hwc: np.ndarray) -> Request:
    """The request for an edit of one image.

    Args:
      offer: of the model.
      values: by the names of `FIELDS` and `EDIT_FIELDS`, without the image; what is missing is the default.
      pixels_hwc: the image, uint8, of a size that the model makes.

    Raises:
      RequestError: see `make_request`; or the steps leave nothing to edit, or another method than Euler's.
    """
    own = {name: value for name, value in values.items() if name not in ("source_prompt", "skip")}
    request = make_request(offer, {**own, "num": 1})
    source = _prompt(values.get("source_prompt"), "the source prompt", "say what the image shows now")
    skip = _whole("skip", values.get("skip", 0), 0, MAX_STEPS - 1)
    if skip >= request.steps:
        raise RequestError(f"skip is {skip}, but must be less than the {request.steps} steps")
    if request.method != "euler":
        raise RequestError(f"the method is {request.method}, but an edit goes with euler only")
    height, width = pixels_hwc.shape[:2]
    return dataclasses.replace(request, height=height, width=width, edit=Edit(pixels_hwc, source, skip))


def _prompt(value: Any, name: str = "the prompt", hint: str = "say what the image shall show") -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name} is {_shown(value)}, but must be text")
    if len(value) > MAX_PROMPT:
        raise RequestError(f"{name} has {len(value):,} characters, but at most {MAX_PROMPT:,} are read: shorten it")
    prompt = " ".join(value.split())
    if not prompt:
        raise RequestError(f"{name} is empty: {hint}")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{name} is no valid Unicode text") from None
    return prompt


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise RequestError(f"{name} is {_shown(value)}, but must be one of {', '.join(choices)}")
    return str(value)


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name} is {_shown(value)}, but must be a number")
    # Compared before it is converted: a whole number may be too large for a float. Nothing compares with NaN.
    if not low <= value <= high:
        raise RequestError(f"{name} is {_shown(value)}, but must be {low:g} to {high:,g}")
    return float(value)


def _guidance(value: Any, low: float) -> float:
    """Where the least scale is that of no guidance, 0 means none too, as in diffusers."""
    if low > 0 and not isinstance(value, bool) and value == 0:
        return 1.0
    return _number("guidance", value, low, MAX_GUIDANCE)


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, float) and math.isfinite(value) and value != int(value):
        raise RequestError(f"{name} is {value:g}, but must be a whole number")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name} is {_shown(value)}, but must be a whole number")
    if not low <= value <= high:
        raise RequestError(f"{name} is {_shown(value)}, but must be {low} to {high}")
    return int(value)


def _size(name: str, values: Mapping[str, Any], default: int, largest: int) -> int:
    if not largest:
        return default
    size = _whole(name, values.get(name, default), SIZE_UNIT, largest)
    if size % SIZE_UNIT:
        raise RequestError(f"{name} is {size}, but must be a multiple of {SIZE_UNIT}: {_nearest(size, largest)}")
    return size


def _nearest(size: int, largest: int) -> str:
    below = size // SIZE_UNIT * SIZE_UNIT
    return " or ".join(str(n) for n in (below, below + SIZE_UNIT) if SIZE_UNIT <= n <= largest)


def _shown(value: Any) -> str:
    """A value from outside, short enough for a message."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"  # Python refuses to print very long ones
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
