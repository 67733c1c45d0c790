import jax
import numpy as np
import pytest

from shortcut_jax.core.tree import flat_paths
from shortcut_jax.run.assembly import init_params
from tests.weights.lora_cases import CFG


@pytest.fixture(scope="session")
def params():
    """Random weights of `lora_cases.CFG` by path, visible everywhere."""
    shapes = flat_paths(jax.eval_shape(lambda key: init_params(CFG, key), jax.random.key(0)))
    rng = np.random.default_rng(0)
    return {k: 0.1 * rng.standard_normal(v.shape, np.float32) for k, v in shapes.items()}


@pytest.fixture(scope="session")
def shapes(params):
    return {k: v.shape for k, v in params.items()}
