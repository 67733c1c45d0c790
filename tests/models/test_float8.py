import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from shortcut_jax.core.latents import image_ids, text_ids
from shortcut_jax.core.types import Condition
from shortcut_jax.models.float8 import GRADIENTS, VALUES, scale_of, scaled
from shortcut_jax.models.flux import Flux, float8_scales
from shortcut_jax.models.init import weight_shapes
from shortcut_jax.models.linear import LinearOptions, linear, no_constraint
from shortcut_jax.models.presets import preset
from shortcut_jax.runtime.hlo import collectives
from shortcut_jax.runtime.sharding import MeshShape, batch_sharding, leaf_spec, make_constrain, make_mesh
from shortcut_jax.steps.networks import collections, make_velocity
from tests.helpers import partitioned_hlo, relative

OPTIONS = LinearOptions((None,) * 4, 1, "float32", "float32", no_constraint, float8=True)
LARGEST = {VALUES: 448.0, GRADIENTS: 57344.0}
STEP = {VALUES: 2**-3, GRADIENTS: 2**-2}
"""From one number of a format to the next, relative to the power of two below them."""


def _rounded(x, dtype, axes=None):
    """What an array becomes with one scale for `axes` together, in float64."""
    values, scale = scaled(x, dtype, scale_of(x, dtype, axes))
    scale = np.asarray(scale, np.float64)
    return np.asarray(values, np.float64) * scale.reshape(*scale.shape, *(1,) * (x.ndim - scale.ndim))


@pytest.mark.parametrize("dtype", [VALUES, GRADIENTS])
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e6])
def test_the_largest_value_is_kept_and_the_others_are_rounded_to_the_next_number(dtype, size):
    x = size * jax.random.normal(jax.random.key(0), (4, 64))
    rounded = _rounded(x, dtype)
    largest = float(jnp.max(jnp.abs(x)))
    assert np.abs(rounded).max() == pytest.approx(largest, rel=1e-6)
    # Half a step of normal numbers; the rest is where the format ends (its smallest number is 2^-9 or 2^-16).
    bound = np.maximum(np.abs(x) * STEP[dtype] / 2, largest / LARGEST[dtype] * (2**-10 if dtype == VALUES else 2**-17))
    assert (np.abs(rounded - x) <= bound * (1 + 1e-5)).all()
    assert not np.array_equal(rounded, x)


def test_zeros_stay_zeros_and_what_is_not_finite_is_seen_in_the_rows_it_is_in():
    assert not _rounded(jnp.zeros((2, 3)), VALUES).any()
    kernel = jnp.ones((4, 1, 1, 2))
    for bad in (jnp.inf, jnp.nan):
        x = jnp.ones((3, 4)).at[1, 2].set(bad)
        row_is_nan = jnp.isnan(linear(x, kernel, None, OPTIONS)).all(axis=(1, 2, 3))
        np.testing.assert_array_equal(row_is_nan, [False, True, False])
        assert jnp.isnan(linear(jnp.ones((3, 4)), kernel.at[1, 0, 0, 1].set(bad), None, OPTIONS)).all()


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("regather", [True, False])
def test_a_layer_and_its_inputs_gradient_are_products_of_rounded_operands(highest_precision, compute_dtype, regather):
    keys = jax.random.split(jax.random.key(1), 4)
    x = jax.random.normal(keys[0], (2, 5, 16), compute_dtype)
    kernel = 0.1 * jax.random.normal(keys[1], (16, 3, 2, 8))
    bias, dy = jax.random.normal(keys[2], (3, 2, 8)), 1e-6 * jax.random.normal(keys[3], (2, 5, 3, 2, 8), compute_dtype)
    options = dataclasses.replace(OPTIONS, compute_dtype=compute_dtype, regather=regather)
    y, backward = jax.vjp(lambda *args: linear(*args, options), x, kernel, bias)
    dx, dkernel, dbias = backward(dy)
    x8, kernel8, dy8 = _rounded(x, VALUES, (2,)), _rounded(kernel, VALUES), _rounded(dy, GRADIENTS, (2, 3, 4))
    near = {"rtol": 1e-5 if compute_dtype == "float32" else 2**-7}
    expected = {
        "y": (y, np.einsum("bld,dphk->blphk", x8, kernel8) + np.asarray(bias, np.float64)),
        "dx": (dx, np.einsum("blphk,dphk->bld", dy8, kernel8)),
        "dkernel": (dkernel, np.einsum("bld,blphk->dphk", np.float64(x), np.float64(dy))),  # of no float8
    }
    for name, (value, wanted) in expected.items():
        np.testing.assert_allclose(value, wanted, **near, atol=near["rtol"] * np.abs(wanted).max(), err_msg=name)
    np.testing.assert_allclose(dbias, jnp.sum(dy.astype(jnp.float32), (0, 1)), rtol=1e-5)
    assert (y.dtype, dx.dtype, dkernel.dtype) == (compute_dtype, compute_dtype, jnp.float32)


def _products(jaxpr):
    """Dtypes of the operands of all matrix products, as they are on a GPU."""
    for e in jaxpr.eqns:
        if e.primitive.name == "dot_general":
            yield tuple(str(v.aval.dtype) for v in e.invars)
        elif "branches" in e.params:  # the last is for every platform but those that are told apart
            yield from _products(e.params["branches"][-1].jaxpr)
        else:
            inner = (getattr(value, "jaxpr", value) for value in e.params.values())
            yield from (found for jaxpr in inner if hasattr(jaxpr, "eqns") for found in _products(jaxpr))


def test_the_blocks_large_products_are_float8_and_no_others():
    cfg = dataclasses.replace(preset("tiny"), double_blocks=1, single_blocks=1, matmul_dtype="float8")
    rows = (
        jnp.zeros((2, 4, cfg.channels)),
        jnp.zeros(2),
        jnp.zeros((2, 3, cfg.text_width)),
        jnp.zeros((2, cfg.pooled_width)),
    )
    ids = jnp.zeros((4, 3)), jnp.zeros((3, 3))
    params = jax.eval_shape(Flux(cfg).init, jax.random.key(0), *rows, *ids)["params"]
    rounded = {path[:-1] for path in traverse_util.flatten_dict(jax.eval_shape(float8_scales, params)["float8"])}
    assert len(rounded) == 2 * 4 + 4 and ("single_blocks", "mlp_out") in rounded

    def loss(params, x):
        return jnp.sum(Flux(cfg).apply({"params": params}, x, *rows[1:], *ids))

    found = list(_products(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, rows[0]).jaxpr))
    values, gradients = "float8_e4m3fn", "float8_e5m2"
    large = 2 * 4 + 4  # qkv, attn_out, mlp_in, mlp_out of two streams and of the single block
    assert found.count((values, values)) == large  # the layers
    assert found.count((gradients, values)) == large  # of their inputs' gradients
    rest = [dtypes for dtypes in found if "float8" in "".join(dtypes)]
    assert len(rest) == 2 * large
    assert math.prod(len(set(dtypes)) for dtypes in found if dtypes not in rest) == 1  # float32 with float32


def test_eight_devices_round_as_one_does_and_gather_kernels_in_float8(highest_precision):
    mesh, names = make_mesh(MeshShape(2, 2, 2)), ("shard", None, "heads", None)
    keys = jax.random.split(jax.random.key(2), 3)
    # The largest values lie on one device each: the others, with parts of their rows or kernel, have to round by them.
    x = jax.random.normal(keys[0], (8, 3, 16)).at[5, 1, 3].set(40.0)
    kernel = jax.random.normal(keys[1], (16, 3, 4, 2)).at[9, 2, 3, 1].set(50.0)
    dy = jax.random.normal(keys[2], (8, 3, 3, 4, 2)).at[7, 0, 0, 0, 0].set(60.0)

    def of(options):
        y, backward = jax.vjp(lambda *args: linear(*args, None, options), x, kernel)
        return y, *backward(dy)

    def sharded(x, kernel, dy):
        options = dataclasses.replace(OPTIONS, names=names, constrain=make_constrain(mesh, 0))
        y, backward = jax.vjp(lambda *args: linear(*args, None, options), x, kernel)
        return y, *backward(dy)

    spec, _ = leaf_spec(mesh, "single_blocks/attn/qkv/kernel", kernel[None].shape, 0)
    rows, shards = batch_sharding(mesh), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec[1:]))
    placed = jax.device_put(x, rows), jax.device_put(kernel, shards), jax.device_put(dy, rows)
    program = jax.jit(sharded, out_shardings=(rows, rows, shards))
    for value, wanted in zip(program(*placed), jax.jit(of, static_argnums=0)(OPTIONS), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-5 * float(jnp.abs(wanted).max()))
    gathered = [c for c in collectives(partitioned_hlo(program.lower(*placed))) if c.kind == "all-gather"]
    assert {dtype for c in gathered for dtype, shape in c.arrays if shape == (16, 3, 4 // 2, 2)} == {"f8e4m3fn"}


def test_scales_of_all_blocks_at_once_are_those_of_each_product():
    cfg = dataclasses.replace(preset("tiny"), double_blocks=0, single_blocks=2, matmul_dtype="float8")
    keys = jax.random.split(jax.random.key(3), 4)
    x, t = jax.random.normal(keys[0], (2, 4, cfg.channels)), jnp.array([0.3, 0.8])
    condition = Condition(jax.random.normal(keys[1], (2, 3, cfg.text_width)), jnp.ones((2, cfg.pooled_width)))
    shapes = weight_shapes(cfg)
    params = jax.tree.map(lambda s: 0.1 * jax.random.normal(jax.random.key(s.size), s.shape), shapes)
    velocity = jax.jit(lambda cfg, params: make_velocity(cfg, 4, 4)(params, condition)(x, t), static_argnums=0)
    ids = image_ids(4, 4), text_ids(3)
    alone = jax.jit(Flux(cfg).apply)({"params": params}, x, t, condition.txt_BMT, condition.vec_BV, *ids)
    rounded, exact = velocity(cfg, params), velocity(dataclasses.replace(cfg, matmul_dtype=None), params)
    np.testing.assert_allclose(rounded, alone, rtol=1e-6, atol=1e-6)
    assert 1e-4 < relative(rounded, exact) < 0.1
    assert collections(params).keys() == {"params"}
