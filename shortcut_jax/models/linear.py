"""The linear layer of every model here: kernels with parts and heads as axes, sharded and reduced on purpose."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from shortcut_jax.core.types import Array
from shortcut_jax.models.float8 import GRADIENTS, VALUES, Scaled, product, scale_of, scaled

Names = tuple[str | None, ...]
Constrain = Callable[[Array, Names], Array]
Initializer = Callable[..., Array]


SHARDS = ("shard", "shard_all")
"""Logical axes that a kernel is split over in storage and whole along when used: over FSDP, or over all its devices."""


FLOAT8, SCALE = "float8", "kernel_scale"
"""The collection with the scales of float8 kernels, and their name there."""


def no_constraint(x: Array, names: Names) -> Array:
    """The identity: what a model uses where no mesh is given."""
    del names
    return x


@dataclass(frozen=True)
class LinearOptions:
    """Everything static about one linear map.

    Attributes:
      names: logical axis of each kernel axis; one of `SHARDS` marks the axis that is split in storage alone.
      in_dims: how many leading kernel axes are contracted with the trailing axes of the input.
      compute_dtype: dtype of the matrix product's result, and of its operands unless they are `float8`.
      reduce_dtype: dtype in which the kernel's gradient leaves its matrix product, and so in which devices add it up.
      constrain: applies a sharding by logical names.
      regather: whether the backward pass gathers the kernel again, or uses the one of the forward pass.
      forward_mode: whether the derivative is forward mode (`jax.jvp`) in place of reverse mode.
      float8: whether the operands of the layer's product, and of its input's gradient, are rounded to float8 (see
        `models/float8.py`); in reverse mode alone.
    """

    names: Names
    in_dims: int
    compute_dtype: str
    reduce_dtype: str
    constrain: Constrain
    regather: bool = True
    forward_mode: bool = False
    float8: bool = False

    def gathered(self, kernel: Array, scale: Array | None) -> Array | Scaled:
        """The kernel cast first and gathered over the FSDP axis second, so that the gather moves the small dtype."""
        if scale is None:
            return self._gather(kernel.astype(self.compute_dtype))
        return Scaled(self._gather(scaled(kernel, VALUES, scale).values), scale)

    def _gather(self, kernel: Array) -> Array:
        stored = self.constrain(kernel, self.names)
        return self.constrain(stored, tuple(None if n in SHARDS else n for n in self.names))


def linear(
    x: Array, kernel: Array, bias: Array | None, options: LinearOptions, kernel_scale: Array | None = None
) -> Array:
    """X @ kernel + bias over the last `in_dims` axes of x, in the compute dtype.

    The derivative is written out for two reasons: the backward pass gathers the kernel again instead of keeping it
    (unless its block is computed again anyway, and with it the gathered kernel), and the kernel's gradient is reduced
    between devices in `reduce_dtype` (a cast before the gather would otherwise make that reduction bfloat16 too,
    silently). A written derivative is of reverse mode alone; forward mode has no residuals and no reduction, and takes
    JAX's own. `kernel_scale` is that of a float8 kernel, where it is known already.
    """
    # Cast out here, so that the derivative with respect to x comes back in x's dtype.
    x = x.astype(options.compute_dtype)
    if options.float8 and kernel_scale is None:
        kernel_scale = scale_of(kernel, VALUES)
    args = x, kernel, bias, kernel_scale, options
    return _forward(*args)[0] if options.forward_mode else _linear(*args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _linear(x: Array, kernel: Array, bias: Array | None, scale: Array | None, options: LinearOptions) -> Array:
    return _forward(x, kernel, bias, scale, options)[0]


def _forward(
    x: Array, kernel: Array, bias: Array | None, scale: Array | None, options: LinearOptions
) -> tuple[Array, Any]:
    n = options.in_dims
    inputs = tuple(range(x.ndim - n, x.ndim))
    gathered = options.gathered(kernel, scale)
    y = _rows_times(x, gathered, (inputs, tuple(range(n))), VALUES, options)
    if bias is not None:
        y = y + bias.astype(options.compute_dtype)
    return y, (x, kernel, None if options.regather else gathered, bias, scale)


def _backward(options: LinearOptions, residuals: Any, dy: Array) -> tuple[Array, Array, Array | None, Array | None]:
    x, kernel, gathered, bias, scale = residuals
    if gathered is None:
        gathered = options.gathered(kernel, scale)
    n, rows = options.in_dims, x.ndim - options.in_dims
    outs, batch = tuple(range(rows, dy.ndim)), tuple(range(rows))
    dx = _rows_times(dy, gathered, (outs, tuple(range(n, kernel.ndim))), GRADIENTS, options)
    dkernel = options.constrain(_product(x, dy, (batch, batch), options.reduce_dtype), options.names)
    dbias = None if bias is None else jnp.sum(dy, axis=batch, dtype=options.reduce_dtype).astype(bias.dtype)
    return dx, dkernel.astype(kernel.dtype), dbias, None if scale is None else jnp.zeros_like(scale)


def _rows_times(x: Array, gathered: Any, contract: Any, dtype: Any, options: LinearOptions) -> Array:
    """Rows, in float8 of `dtype` where the kernel is, times the gathered kernel."""
    if isinstance(gathered, Scaled):
        return product(scaled(x, dtype, scale_of(x, dtype, contract[0])), gathered, contract, options.compute_dtype)
    return _product(x, gathered, contract, options.compute_dtype)


def _product(a: Array, b: Array, contract: tuple[tuple[int, ...], tuple[int, ...]], dtype: str) -> Array:
    """The product of two arrays over the axes `contract` of each, in `dtype`."""
    dims = (contract, ((), ()))
    own = lambda a, b: jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.dtype(dtype))
    if a.dtype == dtype:
        return own(a, b)
    # XLA:CPU has no product of two bfloat16 arrays that is float32.
    widened = lambda a, b: jax.lax.dot_general(a.astype(dtype), b.astype(dtype), dims)
    return jax.lax.platform_dependent(a, b, cpu=widened, default=own)


_linear.defvjp(_forward, _backward)


def xavier_uniform(fan_in: int, fan_out: int) -> Initializer:
    """Uniform within +- sqrt(6 / (fan_in + fan_out)), fans named because kernels here have several axes a side."""
    limit = math.sqrt(6.0 / (fan_in + fan_out))
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)


class Linear(nn.Module):
    """A linear layer with parameters `kernel` [*in, *out] and `bias` [*out], and an adapter where there is one.

    An adapter is low-rank factors in the collection `lora`: `a` [*in, r] and `b` [r, *out], or [*in, parts, r] and
    [r, parts, *out] where each part of the output (its first axis) has factors of its own. The layer then adds
    scale * (x a) b, computed in the compute dtype. The `scale` is in the collection `lora_scale`: [] or [parts], or
    with rows of their own [B, r] or [B, parts, r] (r may be 1): a row whose scale is 0 gets exactly the base's output.

    The scale of a float8 kernel is in the collection `float8`, or else computed at each product: among devices that
    share the kernel, that is one number they have to wait for.

    Attributes:
      out: the output axes, for instance (3, heads, head size).
      names: see `LinearOptions.names`.
      in_dims: how many trailing axes of the input are contracted.
      kernel_init: initializer of the kernel; biases start at zero.
      use_bias: whether there is a bias.
      regather: see `LinearOptions.regather`.
      forward_mode: see `LinearOptions.forward_mode`.
      float8: see `LinearOptions.float8`; an adapter's own products, which are small, stay in the compute dtype.
    """

    out: Sequence[int]
    names: Names
    kernel_init: Initializer
    compute_dtype: str
    param_dtype: str
    reduce_dtype: str
    constrain: Constrain = no_constraint
    in_dims: int = 1
    use_bias: bool = True
    regather: bool = True
    forward_mode: bool = False
    float8: bool = False

    @nn.compact
    def __call__(self, x: Array, low: Array | None = None) -> Array:
        """The layer of x; `low` is what another layer's input adds to this one's before they pass one b together."""
        shape = (*x.shape[x.ndim - self.in_dims :], *self.out)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, tuple(self.out), self.param_dtype) if self.use_bias else None
        scale = self.get_variable(FLOAT8, SCALE) if self.has_variable(FLOAT8, SCALE) else None
        y = linear(x, kernel, bias, self._options(self.names, self.in_dims, self.float8), scale)
        own = self.low(x)
        if own is None or not self.has_variable("lora", "b"):
            return y
        return y + self._raised(own if low is None else own + low, x.ndim - self.in_dims)

    def low(self, x: Array) -> Array | None:
        """The input times `a`, [..., r] or [..., parts, r]; None without an adapter."""
        if not self.has_variable("lora", "a"):
            return None
        a: Array = self.get_variable("lora", "a")
        names = (*self.names[: self.in_dims], *(None,) * (a.ndim - self.in_dims))
        return linear(x, a, None, self._options(names, self.in_dims))

    def _raised(self, low: Array, row_dims: int) -> Array:
        """Scale times `low` times `b`; the rows of `low` have `row_dims` axes, and its parts one, if there are any."""
        b: Array = self.get_variable("lora", "b")
        scale: Array = self.get_variable("lora_scale", "scale")
        has_parts = low.ndim == row_dims + 2
        if scale.ndim == has_parts:
            scale = scale[..., None]
        else:
            scale = scale.reshape(scale.shape[0], *(1,) * (row_dims - 1), *scale.shape[1:])
        # In the scale's float32: alpha / r is rarely a number of the compute dtype.
        low, out_names = (low * scale).astype(low.dtype), self.names[self.in_dims :]
        if not has_parts:
            return linear(low, b, None, self._options((None, *out_names), 1))
        options = self._options((None, *out_names[1:]), 1)
        parts = [linear(low[..., p, :], b[:, p], None, options) for p in range(low.shape[-2])]
        return jnp.stack(parts, axis=row_dims)

    def _options(self, names: Names, in_dims: int, float8: bool = False) -> LinearOptions:
        dtypes = self.compute_dtype, self.reduce_dtype
        return LinearOptions(names, in_dims, *dtypes, self.constrain, self.regather, self.forward_mode, float8)
