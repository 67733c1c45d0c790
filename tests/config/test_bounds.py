"""Bounds that the command line, the prompt line and the Python API share."""

import numpy as np
import pytest

from shortcut_jax.config.bounds import check_prompts, check_seed, check_whole, is_unguided
from shortcut_jax.errors import BoundsError, UserError
from shortcut_jax.inference.request import SampleRequest, numbered

HUGE = 10**5000  # longer than what Python prints


@pytest.mark.parametrize("seed", [-1, -(2**31), 2**32, 2**64, HUGE], ids=["-1", "low", "high", "64 bits", "huge"])
def test_a_seed_that_would_wrap_is_refused_everywhere(seed):
    for ask in (
        lambda: check_seed(seed),
        lambda: numbered(None, seed, 2),
        lambda: numbered([(seed, 0)], 0, 1),
        lambda: SampleRequest(("x",), 1, 1, seed=seed).check(),
        lambda: SampleRequest(("x",), 1, 1, seeds=(0, seed)).check(),
    ):
        with pytest.raises(BoundsError, match="is out of range: seeds have 32 bits, so 0 to 4294967295") as error:
            ask()
        assert len(str(error.value)) < 120 and isinstance(error.value, UserError)


def test_every_seed_of_32_bits_is_its_own():
    seeds = [0, 1, 2**31, np.int64(2**32 - 1)]
    assert [check_seed(seed) for seed in seeds] == seeds
    assert numbered(None, 2**32 - 1, 2) == [(2**32 - 1, 0), (2**32 - 1, 1)]
    with pytest.raises(BoundsError, match=r"the seed is 0.5, but must be a whole number"):
        check_seed(0.5)
    with pytest.raises(BoundsError, match="the number of a draw is 2147483648, but must be at most"):
        numbered([(0, 2**31)], 0, 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(steps=HUGE), "--steps is a number of 16610 bits, but must be at most 1000"),
        (dict(steps=0), "--steps is 0, but must be at least 1"),
        (dict(num=HUGE), "--num is a number of 16610 bits, but must be at most 100000"),
        (dict(prompts=("a cat", "caf\udce9")), r"the prompt 'caf\\udce9' is not UTF-8: character 4"),
    ],
    ids=["steps", "no steps", "num", "prompt"],
)
def test_numbers_and_prompts_out_of_bounds_are_one_short_line(changes, reason):
    with pytest.raises(BoundsError, match=reason):
        SampleRequest(**{"prompts": ("x",), "num": 1, "steps": 1, **changes}).check()


def test_what_is_no_number_or_text_is_named():
    with pytest.raises(BoundsError, match="steps is 'four', but must be a whole number"):
        check_whole("steps", "four", 9)
    with pytest.raises(BoundsError, match="a prompt is None, but must be text"):
        check_prompts([None])


def test_zero_and_one_are_no_guidance():
    assert [s for s in (0, 0.0, 1, 1.0, 0.5, 2, -1, None) if is_unguided(s)] == [0, 0.0, 1, 1.0]
