"""Random weights of InceptionV3 in the names of its release, at full size or with a sixteenth of its widths."""

import functools

import numpy as np

from shortcut_jax.models.inception import InceptionConfig
from shortcut_jax.sources.models import param_shapes
from shortcut_jax.weights.inception import RULES
from shortcut_jax.weights.rules import torch_shapes

SMALL = InceptionConfig(divisor=16)


@functools.cache
def shapes(config):
    return param_shapes("inception", config)


def random_release(config, seed=0):
    """Visible values everywhere; kernels keep the size of activations, and variances are those of a norm."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in torch_shapes(shapes(config), RULES).items():
        noise = rng.standard_normal(shape, np.float32)
        if name.endswith("running_var"):
            made[name] = 1 + 0.5 * np.tanh(noise)
        elif len(shape) == 1:
            made[name] = 0.1 * noise + np.float32(name.endswith("bn.weight"))
        else:
            made[name] = noise * np.float32((2 / np.prod(shape[1:])) ** 0.5)
    return made
