import numpy as np
import pytest

from shortcut_jax.core.tree import flat_paths
from shortcut_jax.models.init import weight_shapes
from tests.weights.lora_cases import CFG


@pytest.fixture(scope="session")
def params():
    """Random weights of `lora_cases.CFG` by path, visible everywhere."""
    shapes = flat_paths(weight_shapes(CFG))
    rng = np.random.default_rng(0)
    return {k: 0.1 * rng.standard_normal(v.shape, np.float32) for k, v in shapes.items()}


@pytest.fixture(scope="session")
def shapes(params):
    return {k: v.shape for k, v in params.items()}
