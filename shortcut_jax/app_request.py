"""What a visitor of the web page may ask for: the bounds of a model, and requests that are checked against them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

MAX_STEPS = 64
MAX_PICTURES = 16
MAX_PROMPT = 1000
MAX_SEED = 2**31 - 1
MAX_GUIDANCE = 30.0
MAX_LORA_SCALE = 4.0
SIZE_UNIT = 16
"""Bounds of every request: steps, pictures, characters, seeds from 0, scales, and what sizes are multiples of."""

FIELDS = ("prompt", "steps", "num", "seed", "guidance", "view", "lora_scale", "height", "width")
"""What a request consists of, in the order in which the page sends it."""


class RequestError(ValueError):
    """A request that is not answered: one line that says what is wrong, and what would do."""


class Offer(NamedTuple):
    """What a model can be asked for.

    Attributes:
      title: what it is, in a few words.
      facts: more of the same, short phrases.
      height: of a picture in pixels, by default or always.
      width: of a picture in pixels.
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
        fixed = {"view": not self.views, "lora_scale": not self.adapters}
        fixed |= dict.fromkeys(("height", "width"), not self.max_size)
        return tuple(name for name in FIELDS if not fixed.get(name))


@dataclass(frozen=True)
class Request:
    """A request within the bounds of a model; `make_request` makes it.

    Attributes:
      prompt: what the pictures shall show.
      steps: sampling steps.
      num: pictures.
      seed: of the noise.
      guidance: guidance scale.
      view: online, fast or slow; empty where there is no choice.
      lora_scale: strength of the adapters.
      height: in pixels.
      width: in pixels.
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


def make_request(offer: Offer, values: Mapping[str, Any]) -> Request:
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
    view = values.get("view", offer.views[0] if offer.views else "")
    if offer.views and view not in offer.views:
        raise RequestError(f"view is {_shown(view)}, but must be one of {', '.join(offer.views)}")
    get = values.get
    return Request(
        _prompt(get("prompt")),
        _whole("steps", get("steps", 4), 1, MAX_STEPS),
        _whole("num", get("num", 4), 1, MAX_PICTURES),
        _whole("seed", get("seed", 0), 0, MAX_SEED),
        _guidance(get("guidance", offer.guidance), offer.min_guidance),
        view,
        _number("lora_scale", get("lora_scale", 1.0), -MAX_LORA_SCALE, MAX_LORA_SCALE),
        _size("height", values, offer.height, offer.max_size),
        _size("width", values, offer.width, offer.max_size),
    )


def _prompt(value: Any) -> str:
    if not isinstance(value, str):
        raise RequestError(f"the prompt is {_shown(value)}, but must be text")
    if len(value) > MAX_PROMPT:
        raise RequestError(f"the prompt has {len(value):,} characters, but at most {MAX_PROMPT:,} are read: shorten it")
    prompt = " ".join(value.split())
    if not prompt:
        raise RequestError("the prompt is empty: say what the picture shall show")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise RequestError("the prompt is no valid Unicode text") from None
    return prompt


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
