import jax
import numpy as np

from shortcut_jax.core.tree import flat_paths
from shortcut_jax.models.lora import adapter_shapes, init_adapters
from shortcut_jax.models.presets import preset
from shortcut_jax.sources import abstract_params
from shortcut_jax.weights.lora import stack
from tests.weights.lora_cases import random_modules

SHAPES = {k: tuple(v.shape) for k, v in flat_paths(abstract_params("flux", preset("tiny"))).items()}


def test_shapes_are_those_of_files():
    stored = {k: v.shape for k, v in stack(random_modules(SHAPES, rank=5), SHAPES).items()}
    assert adapter_shapes(SHAPES, 5) == stored


def test_paths_choose_layers_and_those_that_share_a_b_come_together():
    some = adapter_shapes(SHAPES, 3, r"double_blocks/.*qkv|single_blocks/attn_out")
    assert set(some) == {
        *(f"double_blocks/{stream}_attn/qkv/{half}" for stream in ("img", "txt") for half in "ab"),
        *("single_blocks/attn_out/a", "single_blocks/mlp_out/a", "single_blocks/mlp_out/b"),
    }
    assert adapter_shapes(SHAPES, 3, "none") == {}


def test_a_has_standard_deviation_one_over_r_and_b_is_zero():
    adapters = jax.jit(lambda key: init_adapters(key, SHAPES, 16))(jax.random.key(0))
    values = np.concatenate([np.ravel(v) for k, v in adapters.items() if k.endswith("/a")])
    assert abs(values.std() * 16 - 1) < 0.02 and abs(values.mean()) * 16 < 0.02
    assert not any(v.any() for k, v in adapters.items() if k.endswith("/b"))
    q, k = (np.asarray(adapters["double_blocks/img_attn/qkv/a"])[:, :, p] for p in (0, 1))
    assert not np.array_equal(q, k)
