"""What may be asked of a model, whoever asks: the command line, the prompt line, the Python API."""

import operator
from collections.abc import Sequence
from typing import Any

from shortcut_jax.errors import BoundsError
from shortcut_jax.steps.sampling import seed_bits

MAX_STEPS = 1000
MAX_SIDE = 16_384
MAX_IMAGES = 100_000
MAX_BATCH = 65_536
MAX_TOKENS = 4096
"""Bounds of steps, pixels a side, images a prompt, images at once, and tokens of a prompt."""


def check_whole(name: str, value: Any, most: int, least: int = 1) -> int:
    """A whole number, of whatever type. Raises BoundsError for anything else, or out of bounds."""
    try:
        number = operator.index(value)
    except TypeError:
        raise BoundsError(f"{name} is {brief(value)}, but must be a whole number") from None
    if number < least:
        raise BoundsError(f"{name} is {brief(number)}, but must be at least {least}")
    if number > most:
        raise BoundsError(f"{name} is {brief(number)}, but must be at most {most}")
    return number


def check_seed(seed: Any) -> int:
    """A seed as noise is drawn from it. Raises BoundsError where it is none, or would wrap into another one."""
    try:
        return int(seed_bits(operator.index(seed)))
    except TypeError:
        raise BoundsError(f"the seed is {brief(seed)}, but must be a whole number") from None
    except ValueError:
        raise BoundsError(f"the seed {brief(seed)} is out of range: seeds have 32 bits, so 0 to {2**32 - 1}") from None


def check_prompts(prompts: Sequence[Any]) -> None:
    """Raises BoundsError where a prompt is not text, or has bytes that were not UTF-8 where it came from."""
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise BoundsError(f"a prompt is {brief(prompt)}, but must be text")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            shown = ascii(prompt[max(error.start - 20, 0) : error.start + 20])
            raise BoundsError(f"the prompt {shown} is not UTF-8: character {error.start + 1} cannot be read") from None


def is_unguided(scale: float | None) -> bool:
    """Whether a scale of classifier-free guidance means none: 1, or 0 as in diffusers; it is not the empty prompt."""
    return scale in (0.0, 1.0)


def brief(value: Any) -> str:
    """A value from outside, short enough for a message."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"  # Python refuses to print very long ones
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
