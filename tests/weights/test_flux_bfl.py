import dataclasses
import inspect

import numpy as np
import pytest

from shortcut_jax.core.tree import flat_paths
from shortcut_jax.models.init import weight_shapes
from shortcut_jax.models.presets import preset
from shortcut_jax.weights import flux_bfl, flux_diffusers
from tests.helpers import to_flax, to_torch


def _random_params(**changes):
    cfg = dataclasses.replace(preset("tiny"), **changes)
    shapes = flat_paths(weight_shapes(cfg))
    rng = np.random.default_rng(0)
    return cfg, {k: rng.standard_normal(v.shape, np.float32) for k, v in shapes.items()}


def _diffusers_conversion(width):
    """Diffusers' own BFL -> diffusers conversion, whose source fixes the width at 3072, for another width."""
    import torch
    from diffusers.loaders import single_file_utils

    function = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    source = inspect.getsource(function)
    assert source.count("3072") == 1
    names = {"torch": torch}
    exec(source.replace("3072", str(width)), names)
    return names[function.__name__]


@pytest.mark.parametrize("guidance", [True, False])
def test_names_and_layouts_are_those_that_diffusers_converts(guidance):
    import torch

    cfg, params = _random_params(guidance=guidance)
    bfl = {k: torch.from_numpy(v) for k, v in to_torch(params, flux_bfl.RULES).items()}
    converted = _diffusers_conversion(cfg.width)(bfl)
    expected = to_torch(params, flux_diffusers.RULES)
    assert converted.keys() == expected.keys()
    assert not bfl, "names that diffusers did not read"
    for name, value in converted.items():
        np.testing.assert_array_equal(value.numpy(), expected[name], err_msg=name)


@pytest.mark.parametrize("guidance", [True, False])
def test_there_and_back_is_the_identity(guidance):
    _, params = _random_params(guidance=guidance)
    shapes = {k: v.shape for k, v in params.items()}
    back = to_flax(to_torch(params, flux_bfl.RULES), flux_bfl.RULES, shapes)
    assert back.keys() == params.keys()
    assert all(np.array_equal(back[k], params[k]) for k in params)
