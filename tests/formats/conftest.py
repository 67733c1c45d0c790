import numpy as np
import pytest

from shortcut_jax.core.tree import flat_paths
from shortcut_jax.formats.safetensors import Writer
from shortcut_jax.models.init import weight_shapes
from shortcut_jax.models.presets import preset
from shortcut_jax.weights.params import Spec

AXES = {"axes_dims_rope": [4, 6, 6]}
"""What a config.json has to tell of the tiny Flux."""


@pytest.fixture(scope="module")
def params():
    shapes = flat_paths(weight_shapes(preset("tiny")))
    rng = np.random.default_rng(0)
    return {k: rng.standard_normal(v.shape, np.float32) for k, v in shapes.items()}


def save(file, values, metadata=None):
    """Writes arrays as a safetensors file."""
    with Writer(file, {k: Spec(v.dtype, v.shape) for k, v in values.items()}, metadata or {}) as writer:
        for name, value in values.items():
            writer.write(name, value)
