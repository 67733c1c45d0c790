"""Matrix products of float8 operands, each scaled by its own largest value just before it is rounded.

The formats and where each is used are those of Micikevicius et al. 2022 (arXiv 2209.05433): e4m3 for activations and
weights, e5m2, with more range and fewer digits, for gradients. Scales are made anew at each product ("current
scaling"), so that there is no state of them to keep, and none that a restart or a spike could leave stale.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.linen import fp8_ops

from shortcut_jax.core.types import Array

VALUES, GRADIENTS = jnp.float8_e4m3fn, jnp.float8_e5m2
"""What activations and weights are rounded to, and what gradients are."""

_SMALLEST = 1e-30  # below it a largest value is taken for it: its scale would be zero


class Scaled(NamedTuple):
    """An array in float8: `values` times `scale`, a float32 scalar, are what it stands for."""

    values: Array
    scale: Array


def scaled(x: Array, dtype: jax.typing.DTypeLike) -> Scaled:
    """An array in float8, its largest value at the end of the format's range.

    The scale is one number for the whole array, on however many devices its parts lie. A value that is not finite
    makes all of them NaN, so that the step is skipped and counted (`spikes`): clipping would hide it.
    """
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    scale = jnp.maximum(largest, _SMALLEST) / fp8_ops.get_fp8_max(dtype, jnp.float32)
    return Scaled(fp8_ops.quantize(x, dtype, scale, jnp.float32), scale)


def product(a: Scaled, b: Scaled, contract: tuple[tuple[int, ...], tuple[int, ...]], dtype: str) -> Array:
    """Their product over the axes `contract` of each, added up in float32 and returned in `dtype`.

    A device without float8 products (a CPU) multiplies the same values in float32.
    """
    dims = (contract, ((), ()))
    own = lambda x, y: jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.dtype(dtype))
    wide = lambda x, y: jax.lax.dot_general(x.astype(jnp.float32), y.astype(jnp.float32), dims).astype(dtype)
    y = jax.lax.platform_dependent(a.values, b.values, cpu=wide, default=own)
    return (y * (a.scale * b.scale)).astype(dtype)
