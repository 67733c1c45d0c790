"""Matrix products of float8 operands with scales made anew at each product, one a row and one a kernel.

Activations and weights are e4m3; gradients, which need more range and fewer digits, are e5m2 (Micikevicius et al. 2022,
arXiv 2209.05433). A row of activations (a token) is scaled by its own largest value, and a kernel by its own: both
scales leave the product, and a row's is found where the row is, so that no device waits for another. The gradient of a
kernel adds up rows of different scales: it is computed in the compute dtype, as in torchao's `rowwise_with_gw_hp`.
There is no state of scales that a restart or a spike could leave stale.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.linen import fp8_ops

from shortcut_jax.core.flow import per_row
from shortcut_jax.core.types import Array

VALUES, GRADIENTS = jnp.float8_e4m3fn, jnp.float8_e5m2
"""What activations and weights are rounded to, and what gradients are."""

_SMALLEST = 1e-30  # what is smaller is scaled as if it were this: its own scale would be zero


class Scaled(NamedTuple):
    """An array in float8: `values` times `scale`, float32, are what it stands for."""

    values: Array
    scale: Array


def scale_of(x: Array, dtype: jax.typing.DTypeLike, axes: Sequence[int] | None = None) -> Array:
    """The scale that puts the largest value at the end of a format's range, one for all `axes` together.

    A value that is not finite makes all results of its row NaN, so that the step is skipped and counted: clipping would
    hide it.
    """
    sizes = jnp.abs(jax.lax.stop_gradient(x))
    largest = jnp.max(sizes, axis=None if axes is None else tuple(axes)).astype(jnp.float32)
    return jnp.maximum(largest, _SMALLEST) / fp8_ops.get_fp8_max(dtype, jnp.float32)


def scaled(x: Array, dtype: jax.typing.DTypeLike, scale: Array) -> Scaled:
    """An array in float8; `scale` has the leading axes of the array, or none."""
    values = fp8_ops.quantize(x, dtype, per_row(scale, x), jnp.float32)
    return Scaled(values, scale)


def product(x: Scaled, kernel: Scaled, contract: tuple[tuple[int, ...], tuple[int, ...]], dtype: str) -> Array:
    """Rows times a kernel over the axes `contract` of each, added up in float32 and returned in `dtype`.

    A device without float8 products (a CPU) multiplies the same values in float32.

    Args:
      x: with one scale a row.
      kernel: with one scale.
      contract: the trailing axes of x, and those of the kernel that they are multiplied with.
      dtype: of the result.
    """
    dims = (contract, ((), ()))
    own = lambda a, b: jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.dtype(dtype))
    wide = lambda a, b: jax.lax.dot_general(a.astype(jnp.float32), b.astype(jnp.float32), dims).astype(dtype)
    y = jax.lax.platform_dependent(x.values, kernel.values, cpu=wide, default=own)
    return (y * per_row(x.scale * kernel.scale, y)).astype(dtype)
