"""What a visitor of the web page may ask for: the bounds of a model, and requests that are checked against them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from shortcut_jax.core.flow import METHODS
from shortcut_jax.errors import RequestError
from shortcut_jax.inference.request import Edit, ModelLimits, SampleRequest

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
    "prompt": "what it should show",
    "steps": f"steps of the whole grid, 1 to {MAX_STEPS}",
    "skip": "first steps that are left out: the more, the closer to the image",
}
"""The fields that an edit adds, or that mean something else in it."""


def fields_of(limits: ModelLimits) -> tuple[str, ...]:
    """The fields of a request that a model leaves open, in the order of `FIELDS`."""
    fixed: dict[str, bool] = {"view": not limits.views, "lora_scale": not limits.adapters}
    fixed |= dict.fromkeys(("height", "width"), not limits.any_size)
    return tuple(name for name in FIELDS if not fixed.get(name))


def least_guidance(limits: ModelLimits) -> float:
    """The least scale: below 1 only where the model is conditioned on it, or has such a default."""
    return 0.0 if limits.guidance.embedded is not None else min(1.0, limits.guidance.value)


def make_request(limits: ModelLimits, values: Mapping[str, Any]) -> SampleRequest:
    """Checks what came from outside, of whatever type it is.

    Args:
      limits: of the model.
      values: by the names of `FIELDS`; what is missing is the default.

    Raises:
      RequestError: a value is out of bounds or of another type, or no choice of this model.
    """
    for name in values:
        if name not in fields_of(limits):
            raise RequestError(f"{name} cannot be chosen for this model")
    get = values.get
    num = _whole("num", get("num", 4), 1, MAX_IMAGES)
    adapted = limits.adapters
    return SampleRequest(
        (_prompt(get("prompt")),),
        num=num,
        steps=_whole("steps", get("steps", 4), 1, MAX_STEPS),
        seed=_whole("seed", get("seed", 0), 0, MAX_SEED),
        guidance=_guidance(get("guidance", limits.guidance.value), least_guidance(limits)),
        view=_choice("view", get("view", limits.views[0]), limits.views) if limits.views else None,
        lora_scale=_number("lora_scale", get("lora_scale", 1.0), -MAX_LORA_SCALE, MAX_LORA_SCALE) if adapted else None,
        height=_size("height", values, limits.height, limits.any_size),
        width=_size("width", values, limits.width, limits.any_size),
        method=_choice("method", get("method", "euler"), tuple(METHODS)),
        shift=_number("shift", get("shift", 0), 0.0, MAX_SHIFT) or None,
        batch_size=1 if num == 1 and limits.at_once else limits.at_once,
    )


def make_edit(limits: ModelLimits, values: Mapping[str, Any], pixels_hwc: np.ndarray) -> SampleRequest:
    """The request for an edit of one image.

    Args:
      limits: of the model.
      values: by the names of `FIELDS` and `EDIT_FIELDS`, without the image; what is missing is the default.
      pixels_hwc: the image, uint8, of a size that the model makes.

    Raises:
      RequestError: see `make_request`; or the steps leave nothing to edit, or another method than Euler's.
    """
    own = {name: value for name, value in values.items() if name not in ("source_prompt", "skip")}
    request = make_request(limits, {**own, "num": 1})
    source = _prompt(values.get("source_prompt"), "the source prompt", "say what the image shows now")
    skip = _whole("skip", values.get("skip", 0), 0, MAX_STEPS - 1)
    if skip >= request.steps:
        raise RequestError(f"skip is {skip}, but must be less than the {request.steps} steps")
    if request.method != "euler":
        raise RequestError(f"the method is {request.method}, but an edit goes with euler only")
    height, width = pixels_hwc.shape[:2]
    return dataclasses.replace(request, height=height, width=width, edit=Edit(pixels_hwc, source, skip))


def _prompt(value: Any, name: str = "the prompt", hint: str = "say what the image should show") -> str:
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


def _size(name: str, values: Mapping[str, Any], largest: int, any_size: bool) -> int:
    if not any_size:
        return largest
    size = _whole(name, values.get(name, largest), SIZE_UNIT, largest)
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
