import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.core.latents import image_ids, text_ids
from shortcut_jax.core.tree import flat_paths
from shortcut_jax.models.flux import REMAT_POLICIES, Flux, layer_norm, modulate
from shortcut_jax.models.init import init_params, weight_shapes
from shortcut_jax.models.presets import preset

TINY = preset("tiny")
FULL = dataclasses.replace(TINY, guidance=True, step_size=True)
IMG, TXT = 6, 3
OPTIONAL = ("guidance_B", "step_B")


def _inputs(cfg, rows=2):
    keys = jax.random.split(jax.random.key(1), 3)
    inputs = dict(
        x_BNC=jax.random.normal(keys[0], (rows, IMG, cfg.channels)),
        t_B=jnp.linspace(0.2, 0.9, rows),
        txt_BMT=jax.random.normal(keys[1], (rows, TXT, cfg.text_width)),
        vec_BV=jax.random.normal(keys[2], (rows, cfg.pooled_width)),
        img_ids_N3=image_ids(4, 6),
        txt_ids_M3=text_ids(TXT),
    )
    if cfg.guidance:
        inputs["guidance_B"] = jnp.linspace(1.0, 4.0, rows)
    if cfg.step_size:
        inputs["step_B"] = jnp.linspace(0.0, 0.5, rows)
    return inputs


def _apply(cfg):
    return lambda params, inputs: Flux(cfg).apply({"params": params}, **inputs)


@functools.cache
def _shapes(cfg):
    return weight_shapes(cfg)


def _noisy(params, skip=()):
    rng = np.random.default_rng(0)
    leaves = {path: rng.standard_normal(x.shape, np.float32) for path, x in flat_paths(params).items()}
    noisy = [x if path in skip else x + 0.1 * leaves[path] for path, x in flat_paths(params).items()]
    return jax.tree.unflatten(jax.tree.structure(params), noisy)


@pytest.fixture(scope="module")
def initial():
    return jax.jit(lambda key: init_params(FULL, key))(jax.random.key(0))


def _output_and_gradients(cfg):
    """Gradients of a mean square, with the output beside them."""

    @jax.jit
    def run(params, inputs):
        loss = lambda params: (jnp.mean(jnp.square((out := _apply(cfg)(params, inputs)) - 1.0)), out)
        grads, out = jax.grad(loss, has_aux=True)(params)
        return out, grads

    return run


@pytest.fixture(scope="module")
def run():
    return _output_and_gradients(FULL)


@pytest.fixture(scope="module")
def forward(run):
    return lambda params, inputs: run(params, inputs)[0]


@pytest.mark.slow
def test_the_output_is_zero_at_first_and_not_once_every_weight_is_set(initial, forward):
    out = forward(initial, _inputs(FULL))
    assert out.shape == (2, IMG, TINY.channels) and out.dtype == jnp.float32
    assert not np.any(out)
    assert np.abs(forward(_noisy(initial), _inputs(FULL))).min() > 0.0


@pytest.mark.parametrize("name", ["x_BNC", "t_B", "txt_BMT", "vec_BV", "guidance_B", "step_B"])
def test_the_first_rows_output_depends_on_each_of_its_own_inputs_and_on_no_other_rows(initial, forward, name):
    params, inputs = _noisy(initial), _inputs(FULL)
    out = forward(params, inputs)
    scale = jnp.array([1.3, 1.0]).reshape(2, *(1,) * (inputs[name].ndim - 1))
    offset = jnp.array([0.1, 0.0]).reshape(scale.shape)
    changed = forward(params, {**inputs, name: inputs[name] * scale + offset})
    assert np.abs(changed[0] - out[0]).max() > 1e-4
    np.testing.assert_allclose(changed[1], out[1], atol=1e-6)


def test_image_tokens_are_known_by_their_ids_and_text_tokens_are_a_set(initial, forward):
    params, inputs = _noisy(initial), _inputs(FULL)
    out = forward(params, inputs)
    order = np.array([4, 0, 5, 2, 1, 3])
    tokens_only = {**inputs, "x_BNC": inputs["x_BNC"][:, order]}
    with_ids = {**tokens_only, "img_ids_N3": inputs["img_ids_N3"][order]}
    np.testing.assert_allclose(forward(params, with_ids), out[:, order], rtol=1e-3, atol=1e-4)
    assert np.abs(forward(params, tokens_only) - out[:, order]).max() > 1e-3
    text = {**inputs, "txt_BMT": inputs["txt_BMT"][:, ::-1]}
    np.testing.assert_allclose(forward(params, text), out, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scan_unroll", [1, 2])
@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_remat_and_unrolling_leave_parameter_paths_and_shapes_as_they_are(remat, scan_unroll):
    assert _shapes(dataclasses.replace(FULL, remat=remat, scan_unroll=scan_unroll)) == _shapes(FULL)


@pytest.mark.slow
def test_remat_and_unrolling_leave_gradients_as_they_are(initial, run):
    args = _noisy(initial), _inputs(FULL)
    _, grads = run(*args)
    for changes in (dict(remat="selective", scan_unroll=2), dict(remat="branch")):
        _, others = _output_and_gradients(dataclasses.replace(FULL, **changes))(*args)
        for path, grad in flat_paths(grads).items():
            assert np.any(grad), path
            other, size = flat_paths(others)[path], np.abs(grad).max()
            np.testing.assert_allclose(other, grad, rtol=1e-3, atol=1e-4 * size, err_msg=path)


def test_a_stricter_remat_policy_computes_more_products_again():
    def dots(remat):
        cfg = dataclasses.replace(TINY, double_blocks=0, remat=remat)
        loss = lambda params: jnp.sum(_apply(cfg)(params, _inputs(TINY)))
        return str(jax.make_jaxpr(jax.grad(loss))(_shapes(cfg))).count("= dot_general")

    assert set(REMAT_POLICIES) == {"none", "full", "branch", "branch_mlp", "selective", "dots"}
    assert dots("none") < dots("selective") < dots("full")
    assert dots("none") < dots("dots") < dots("full")
    # A single block's branch is attention's output layer and the MLP's second one: neither is computed again.
    assert dots("full") - dots("branch") == 2 and dots("branch") - dots("branch_mlp") == 1


@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("wanted", [True, False])
def test_a_missing_or_superfluous_input_raises_and_is_named(name, wanted):
    field = {"guidance_B": "guidance", "step_B": "step_size"}[name]
    inputs = _inputs(dataclasses.replace(TINY, **{field: not wanted}))
    words = f"{'needs' if wanted else 'has no'} a {field.replace('_', ' ')} input"
    with pytest.raises(ValueError, match=words):
        _apply(dataclasses.replace(TINY, **{field: wanted}))({}, inputs)


def test_the_step_size_changes_nothing_at_first_but_its_weights_learn(initial, run):
    params = _noisy(initial, skip=("step_in/out_layer/kernel", "step_in/out_layer/bias"))
    inputs = _inputs(FULL)

    out, grads = run(params, inputs)
    other, _ = run(params, {**inputs, "step_B": inputs["step_B"] + 0.3})
    np.testing.assert_array_equal(other, out)
    grads = grads["step_in"]
    assert np.any(out) and np.any(grads["out_layer"]["kernel"]) and np.any(grads["out_layer"]["bias"])


def test_bfloat16_compute_keeps_the_output_float32_and_the_weights_in_their_own_dtype():
    cfg = dataclasses.replace(TINY, compute_dtype="bfloat16", param_dtype="float32")
    shapes = _shapes(cfg)
    assert {x.dtype.name for x in jax.tree.leaves(shapes)} == {"float32"}
    assert jax.eval_shape(_apply(cfg), shapes, _inputs(cfg)).dtype == jnp.float32
    half = _shapes(dataclasses.replace(TINY, param_dtype="bfloat16"))
    assert {x.dtype.name for x in jax.tree.leaves(half)} == {"bfloat16"}


def _xavier_limits(cfg):
    d, f = cfg.width, cfg.hidden
    fans = {"img_in": (cfg.channels, d), "txt_in": (cfg.text_width, d)}
    for stream in ("img", "txt"):
        fans[f"double_blocks/{stream}_attn/qkv"] = (d, 3 * d)
        fans[f"double_blocks/{stream}_attn_out"] = (d, d)
        fans[f"double_blocks/{stream}_mlp_in"] = (d, f)
        fans[f"double_blocks/{stream}_mlp_out"] = (f, d)
    # Flux's single block fuses attention and MLP: D -> 3 D + F and D + F -> D.
    fans["single_blocks/attn/qkv"] = fans["single_blocks/mlp_in"] = (d, 3 * d + f)
    fans["single_blocks/attn_out"] = fans["single_blocks/mlp_out"] = (d + f, d)
    return {f"{name}/kernel": math.sqrt(6 / sum(pair)) for name, pair in fans.items()}


def test_every_weight_starts_from_its_own_distribution(initial):
    limits = _xavier_limits(FULL)
    normal = {
        f"{e}/{layer}/kernel" for e in ("time_in", "guidance_in", "pooled_in") for layer in ("in_layer", "out_layer")
    }
    normal.add("step_in/in_layer/kernel")
    params = flat_paths(initial)
    zero = {path for path in params if path.endswith("/bias") or "modulation/" in path}
    zero |= {"final_linear/kernel", "step_in/out_layer/kernel"}
    ones = {path for path in params if path.endswith("_norm/scale")}
    assert set(params) == set(limits) | normal | zero | ones
    for path, limit in limits.items():
        assert 0.9 * limit < np.abs(params[path]).max() <= limit, path
    for path in normal:
        assert np.std(params[path]) == pytest.approx(0.02, rel=0.1), path
        assert np.abs(params[path]).max() > 0.05, path
    assert not any(np.any(params[path]) for path in zero)
    assert ones and all((np.asarray(params[path]) == 1.0).all() for path in ones)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "first"),
    [
        ("double_blocks/img_attn/qkv/kernel", (-0.07124008, 0.07078992, -0.14481202)),
        ("single_blocks/mlp_in/kernel", (0.06882015, 0.10331255, -0.13755931)),
    ],
)
def test_a_seed_draws_the_weights_that_it_has_always_drawn(path, first):
    """So that a run with an old seed is the old run."""
    params = flat_paths(init_params(preset("tiny"), jax.random.key(0)))
    np.testing.assert_allclose(params[path].ravel()[:3], first, rtol=1e-5)


def test_blocks_of_a_stack_start_differently(initial):
    for path in ("double_blocks/img_mlp_in/kernel", "single_blocks/attn/qkv/kernel"):
        stack = flat_paths(initial)[path]
        assert len(stack) == 2 and np.abs(stack[0] - stack[1]).max() > 0.01


def test_the_program_does_not_grow_with_depth():
    def size(depth):
        cfg = dataclasses.replace(TINY, double_blocks=depth, single_blocks=depth)
        return len(jax.jit(_apply(cfg)).lower(_shapes(cfg), _inputs(cfg)).as_text())

    assert size(8) < 1.05 * size(2)


@pytest.mark.parametrize("missing", ["double_blocks", "single_blocks"])
def test_a_model_may_lack_one_kind_of_block(missing):
    cfg = dataclasses.replace(TINY, **{missing: 0})
    shapes = _shapes(cfg)
    assert missing not in shapes
    assert jax.eval_shape(_apply(cfg), shapes, _inputs(cfg)).shape == (2, IMG, cfg.channels)


def test_layer_norm_has_zero_mean_and_unit_variance_whatever_the_scale_and_offset():
    x = 300.0 + 5.0 * jax.random.normal(jax.random.key(0), (2, 3, 64))
    y = layer_norm(x)
    np.testing.assert_allclose(y.mean(axis=-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(y.var(axis=-1), 1.0, rtol=1e-4)
    half = layer_norm(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, layer_norm(x.astype(jnp.bfloat16).astype(jnp.float32)).astype(jnp.bfloat16))


def test_modulation_scales_around_one_and_shifts_each_row():
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    shift, scale = jnp.zeros((2, 8)).at[1].set(4.0), jnp.zeros((2, 8)).at[1].set(2.0)
    y, normed = modulate(x, shift, scale), layer_norm(x)
    np.testing.assert_allclose(y[0], normed[0], atol=1e-6)
    np.testing.assert_allclose(y[1], 3.0 * normed[1] + 4.0, rtol=1e-5)
