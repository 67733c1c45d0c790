import math

import numpy as np
import pytest

from shortcut_jax.errors import RequestError
from shortcut_jax.inference.request import Guidance, ModelLimits, SampleRequest
from shortcut_jax.webapp.request import FIELDS, MAX_SEED, fields_of, make_edit, make_request

RUN = ModelLimits("digits", (), 8, 8, views=("slow", "online", "fast"), at_once=4)
PIPELINE = ModelLimits("flux", (), 1024, 1024, any_size=True, guidance=Guidance(3.5, 1.0), adapters=True)


def _asked(limits=RUN, **values):
    return make_request(limits, {"prompt": "a cat", **values})


def test_what_is_missing_is_the_default_of_the_model():
    size = {"height": 8, "width": 8, "batch_size": 4}
    assert _asked() == SampleRequest(("a cat",), 4, 4, 1.0, 0, view="slow", **size)
    assert _asked(num=1).batch_size == 1
    size = {"height": 1024, "width": 1024}
    assert _asked(PIPELINE) == SampleRequest(("a cat",), 4, 4, 3.5, 0, lora_scale=1.0, **size)
    assert set(fields_of(RUN)) == set(FIELDS) - {"lora_scale", "height", "width"}
    assert set(fields_of(PIPELINE)) == set(FIELDS) - {"view"}


def test_values_within_the_bounds_become_plain_numbers():
    request = _asked(prompt="  a \n cat ", steps=64.0, num=16, seed=MAX_SEED, guidance=2, view="fast")
    size = {"height": 8, "width": 8, "batch_size": 4}
    assert request == SampleRequest(("a cat",), 16, 64, 2.0, MAX_SEED, view="fast", **size)
    assert [type(v) for v in (request.steps, request.seed, request.guidance)] == [int, int, float]
    assert _asked(guidance=0).guidance == 1.0  # none, as pasted from snippets of diffusers
    assert _asked(PIPELINE, height=16, width=1008, lora_scale=-4).width == 1008
    assert _asked(method="heun", shift=3).shift == 3.0 and _asked(shift=0).shift is None


BAD = [
    (dict(prompt=""), "the prompt is empty: say what"),
    (dict(prompt=" \n\t"), "the prompt is empty"),
    (dict(prompt=None), "the prompt is None, but must be text"),
    (dict(prompt=["a"]), r"the prompt is \['a'\], but must be text"),
    (dict(prompt="a" * 1001), "the prompt has 1,001 characters, but at most 1,000"),
    (dict(prompt="a \ud800"), "no valid Unicode"),
    (dict(steps=0), "steps is 0, but must be 1 to 64"),
    (dict(steps=1000), "steps is 1000, but must be 1 to 64"),
    (dict(steps=2.5), "steps is 2.5, but must be a whole number"),
    (dict(steps=math.nan), "steps is nan, but must be 1 to 64"),
    (dict(steps=math.inf), "steps is inf, but must be 1 to 64"),
    (dict(steps="4"), "steps is '4', but must be a whole number"),
    (dict(steps=True), "steps is True, but must be a whole number"),
    (dict(steps=None), "steps is None, but must be a whole number"),
    (dict(steps=10**5000), "steps is a number of 16610 bits, but must be 1 to 64"),
    (dict(num=17), "num is 17, but must be 1 to 16"),
    (dict(seed=-1), "seed is -1, but must be 0 to 2147483647"),
    (dict(seed=2**31), "seed is 2147483648"),
    (dict(guidance=0.5), "guidance is 0.5, but must be 1 to 30"),
    (dict(guidance=math.nan), "guidance is nan"),
    (dict(guidance=10**400), "guidance is a number of 1329 bits"),
    (dict(guidance={"x": "y" * 99}), r"guidance is \{'x': 'y+\.\.\., but must be a number"),
    (dict(view="middle"), "view is 'middle', but must be one of slow, online, fast"),
    (dict(view=["slow"]), "view is "),
    (dict(method="midpoint"), "method is 'midpoint', but must be one of euler, heun"),
    (dict(method=["euler"]), "method is "),
    (dict(shift=-0.1), "shift is -0.1, but must be 0 to 20"),
    (dict(shift=21), "shift is 21"),
    (dict(shift=math.nan), "shift is nan"),
    (dict(lora_scale=1.0), "lora_scale cannot be chosen for this model"),
    (dict(height=64), "height cannot be chosen"),
    (dict(colour="red"), "colour cannot be chosen"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=lambda x: None if isinstance(x, str) else next(iter(x)))
def test_what_is_out_of_bounds_or_of_another_type_is_one_line(values, message):
    with pytest.raises(RequestError, match=message) as caught:
        _asked(**values)
    assert len(str(caught.value)) < 120 and "\n" not in str(caught.value)


def test_sizes_are_multiples_of_sixteen_up_to_the_bound():
    for values, message in (
        (dict(height=100), "height is 100, but must be a multiple of 16: 96 or 112"),
        (dict(width=1040), "width is 1040, but must be 16 to 1024"),
        (dict(height=0), "height is 0, but must be 16 to 1024"),
        (dict(lora_scale=4.5), "lora_scale is 4.5, but must be -4 to 4"),
        (dict(view="slow"), "view cannot be chosen"),
    ):
        with pytest.raises(RequestError, match=message):
            _asked(PIPELINE, **values)


def test_an_edit_has_its_own_fields_and_the_size_of_its_image():
    pixels = np.zeros((32, 48, 3), np.uint8)
    request = make_edit(PIPELINE, {"prompt": "a dog", "source_prompt": " a  cat", "steps": 8, "skip": 2.0}, pixels)
    assert (request.height, request.width, request.num, request.steps) == (32, 48, 1, 8)
    assert (request.edit.source_prompt, request.edit.skip) == ("a cat", 2) and request.edit.pixels_hwc is pixels
    for changes, message in (
        (dict(skip=8), "skip is 8, but must be less than the 8 steps"),
        (dict(skip=-1), "skip is -1, but must be 0 to 63"),
        (dict(source_prompt=""), "the source prompt is empty: say what the image shows now"),
        (dict(source_prompt=None), "the source prompt is None"),
        (dict(method="heun"), "the method is heun, but an edit goes with euler only"),
    ):
        with pytest.raises(RequestError, match=message):
            make_edit(PIPELINE, {"prompt": "a dog", "source_prompt": "a cat", "steps": 8, **changes}, pixels)
