import jax
import jax.numpy as jnp
import numpy as np

from shortcut_jax.core.tree import flat_paths
from shortcut_jax.models.lora import adapter_shapes, concatenate, init_adapters, scales
from shortcut_jax.models.presets import preset
from shortcut_jax.sources.models import abstract_params
from shortcut_jax.weights.lora import stack
from shortcut_jax.weights.rules import nest
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


def test_scales_have_the_axes_of_their_layers():
    adapters = nest(init_adapters(jax.random.key(0), SHAPES, 3))
    depth = {k.split("/")[0]: v[0] for k, v in SHAPES.items() if "_blocks/" in k}
    layers = {p.rpartition("/")[0] for p in flat_paths(adapters) if p.endswith("/b")}
    per_row = jnp.arange(10.0).reshape(5, 2)
    for scale, inner in ((jnp.float32(2.0), ()), (per_row, (5, 2))):
        flat = flat_paths(scales(adapters, scale))
        assert flat.keys() == {f"{layer}/scale" for layer in layers}
        for path, value in flat.items():
            lead = (depth[path.split("/")[0]],) if "_blocks/" in path else ()
            parts = (3,) if "qkv" in path else ()
            assert value.shape == (*lead, *inner[:1], *parts, *inner[1:]), path
    qkv = flat_paths(scales(adapters, per_row))["double_blocks/img_attn/qkv/scale"]
    for part in range(3):
        np.testing.assert_array_equal(qkv[1, :, part], per_row)


def test_concatenated_adapters_have_the_ranks_of_both_side_by_side():
    one, two = (nest(init_adapters(jax.random.key(k), SHAPES, 3)) for k in (0, 1))
    for path, value in flat_paths(concatenate(one, two)).items():
        axis = -1 if path.endswith("/a") else int("_blocks/" in path)
        first, second = np.split(np.asarray(value), 2, axis)
        np.testing.assert_array_equal(first, flat_paths(one)[path])
        np.testing.assert_array_equal(second, flat_paths(two)[path])
