import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.models.linear import Linear, LinearOptions, linear, no_constraint, xavier_uniform

PLAIN = LinearOptions(("shard", None), 1, "float32", "float32", no_constraint)
CASES = {
    "one axis to parts and heads": ((2, 5, 4), (4, 3, 2, 6), 1, "blk,kphd->blphd"),
    "heads to one": ((2, 5, 3, 4), (3, 4, 7), 2, "blhk,hkd->bld"),
    "rows without tokens": ((3, 4), (4, 6, 2), 1, "bk,kpd->bpd"),
}


def _inputs(x_shape, kernel_shape, in_dims, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    x, kernel = jax.random.normal(keys[0], x_shape, dtype), jax.random.normal(keys[1], kernel_shape, dtype)
    bias = jax.random.normal(keys[2], kernel_shape[in_dims:], dtype)
    weights = jax.random.normal(keys[3], (*x_shape[: len(x_shape) - in_dims], *kernel_shape[in_dims:]))
    return x, kernel, bias, weights


def _options(kernel_shape, in_dims, **changes):
    return dataclasses.replace(PLAIN, names=(None,) * len(kernel_shape), in_dims=in_dims, **changes)


@pytest.mark.parametrize(("case", "use_bias"), [*((case, True) for case in CASES), ("heads to one", False)])
def test_values_and_gradients_are_those_of_an_einsum(highest_precision, case, use_bias):
    x_shape, kernel_shape, in_dims, subscripts = CASES[case]
    x, kernel, bias, weights = _inputs(x_shape, kernel_shape, in_dims)
    args = (x, kernel, bias) if use_bias else (x, kernel)

    def ours(x, kernel, bias=None):
        return linear(x, kernel, bias, _options(kernel_shape, in_dims))

    def reference(x, kernel, bias=0.0):
        return jnp.einsum(subscripts, x, kernel) + bias

    @jax.jit
    def both():
        results = []
        for f in (ours, reference):
            y, backward = jax.vjp(f, *args)
            results.append((y, *backward(weights)))
        return results

    for value, expected in zip(*both(), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_forward_mode_gives_the_derivative_of_an_einsum(highest_precision, case):
    x_shape, kernel_shape, in_dims, subscripts = CASES[case]
    x, kernel, bias, _ = _inputs(x_shape, kernel_shape, in_dims)
    options = _options(kernel_shape, in_dims, forward_mode=True)
    tangents = jax.tree.map(jnp.cos, (x, kernel, bias))
    value, slope = jax.jvp(lambda *args: linear(*args, options), (x, kernel, bias), tangents)
    expected = jax.jvp(lambda x, k, b: jnp.einsum(subscripts, x, k) + b, (x, kernel, bias), tangents)
    for got, wanted in zip((value, slope), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: linear(x, kernel, bias, _options(kernel_shape, in_dims)), (x,), tangents[:1])


def _dots(f, *args):
    """Matrix products as they are for every platform but those that are told apart from the rest."""

    def of(jaxpr):
        for e in jaxpr.eqns:
            if e.primitive.name == "dot_general":
                yield e
            for branch in e.params.get("branches", ())[-1:]:
                yield from of(branch.jaxpr)

    return list(of(jax.make_jaxpr(f)(*args).jaxpr))


@pytest.mark.parametrize("reduce_dtype", ["float32", "bfloat16"])
def test_the_kernels_gradient_leaves_its_product_in_the_reduce_dtype(reduce_dtype):
    x, kernel, bias, _ = _inputs((2, 5, 4), (4, 3), 1)
    options = _options(kernel.shape, 1, compute_dtype="bfloat16", reduce_dtype=reduce_dtype)
    y, backward = jax.vjp(lambda kernel: linear(x.astype(jnp.bfloat16), kernel, bias, options), kernel)
    assert y.dtype == jnp.bfloat16
    (dot,) = [e for e in _dots(backward, y) if e.outvars[0].aval.shape in ((4, 3), (3, 4))]
    assert dot.params["preferred_element_type"] == jnp.dtype(reduce_dtype)
    assert {v.aval.dtype for v in dot.invars} == {jnp.dtype("bfloat16")}
    assert dot.outvars[0].aval.dtype == jnp.dtype(reduce_dtype)


def test_a_cpu_computes_what_other_platforms_do_in_bfloat16_too():
    x, kernel, bias, _ = _inputs((2, 5, 4), (4, 3), 1)
    options = _options(kernel.shape, 1, compute_dtype="bfloat16")
    grad = jax.jit(jax.grad(lambda kernel: jnp.sum(linear(x, kernel, bias, options).astype(jnp.float32) ** 2)))
    half = lambda a: np.asarray(a).astype(jnp.bfloat16).astype(np.float32)
    y = (half(x) @ half(kernel) + half(bias)).astype(np.float32)
    np.testing.assert_allclose(grad(kernel), np.einsum("abi,abj->ij", half(x), 2 * y), rtol=0.03, atol=0.1)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("input_dtype", ["float32", "bfloat16"])
def test_gradients_have_the_dtypes_of_what_they_are_gradients_of(param_dtype, input_dtype):
    x, kernel, bias, _ = _inputs((2, 5, 4), (4, 3), 1)
    options = _options(kernel.shape, 1, compute_dtype="bfloat16")
    args = x.astype(input_dtype), kernel.astype(param_dtype), bias.astype(param_dtype)
    loss = lambda *args: jnp.sum(linear(*args, options).astype(jnp.float32))
    grads = jax.eval_shape(jax.grad(loss, (0, 1, 2)), *args)
    assert [g.dtype for g in grads] == [input_dtype, param_dtype, param_dtype]


def test_the_bias_gradient_of_many_bfloat16_rows_is_summed_in_float32():
    x, kernel, bias = jnp.zeros((1, 1000, 2)), jnp.zeros((2, 3)), jnp.zeros(3)
    options = _options(kernel.shape, 1, compute_dtype="bfloat16")
    grad = jax.grad(lambda b: jnp.sum(linear(x, kernel, b, options).astype(jnp.float32)))(bias)
    np.testing.assert_array_equal(grad, np.full(3, 1000.0))


def test_the_kernel_is_cast_before_it_is_gathered_and_its_gradient_is_sharded_like_the_kernel():
    calls = []

    def constrain(x, names):
        calls.append((x.dtype.name, x.shape, names))
        return x

    x, kernel, bias, _ = _inputs((2, 5, 4), (4, 2, 3), 1)
    options = LinearOptions(("shard", "heads", None), 1, "bfloat16", "float32", constrain)
    gathering = [("bfloat16", (4, 2, 3), ("shard", "heads", None)), ("bfloat16", (4, 2, 3), (None, "heads", None))]
    y, backward = jax.vjp(lambda k: linear(x, k, bias, options), kernel)
    assert calls == gathering
    calls.clear()
    jax.eval_shape(backward, y)
    assert calls == [*gathering, ("float32", (4, 2, 3), ("shard", "heads", None))]


@pytest.mark.parametrize(("fan_in", "fan_out"), [(64, 64), (16, 400)])
def test_xavier_fills_its_range_whatever_the_shape(fan_in, fan_out):
    limit = math.sqrt(6 / (fan_in + fan_out))
    values = np.asarray(xavier_uniform(fan_in, fan_out)(jax.random.key(0), (3, 20, 50), jnp.float32))
    assert 0.99 * limit < values.max() <= limit and -limit <= values.min() < -0.99 * limit
    assert abs(values.mean()) < 0.03 * limit
    np.testing.assert_allclose(values.var(), 2 / (fan_in + fan_out), rtol=0.05)


@pytest.mark.parametrize("use_bias", [True, False])
def test_the_layer_takes_its_kernel_shape_from_input_and_output_axes(use_bias):
    init = lambda key, shape, dtype: jnp.full(shape, 0.5, dtype)
    layer = Linear((7, 2), ("heads", None, None, None), init, "bfloat16", "float32", "float32", in_dims=2)
    layer = layer.clone(use_bias=use_bias)
    y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((2, 5, 3, 4)))
    shapes = jax.tree.map(lambda p: (p.shape, p.dtype.name), variables["params"])
    expected = {"kernel": ((3, 4, 7, 2), "float32"), "bias": ((7, 2), "float32")}
    assert shapes == (expected if use_bias else {"kernel": expected["kernel"]})
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, np.full((2, 5, 7, 2), 6.0))
