"""Rotary position embedding over several axes, and the sinusoidal embedding of scalars. Both in float32."""

import math

import chex
import jax.numpy as jnp
import numpy as np

from shortcut_jax.core.types import Array


def rotary_phases(ids_L3: Array, axes: tuple[int, ...], theta: float) -> tuple[Array, Array]:
    """Cosine and sine of the rotation of each pair of head channels.

    Args:
      ids_L3: positions, one column an axis.
      axes: head channels given to each axis, each even; their sum is the head size K.
      theta: the base of the frequencies, 10,000 in Flux.

    Returns:
      cos and sin, each [L, K / 2], float32.
    """
    chex.assert_shape(ids_L3, (None, len(axes)))
    columns = []
    for axis, size in enumerate(axes):
        # In float64 and then rounded, as the reference does: float32 powers would cost a digit.
        frequencies = 1.0 / theta ** (np.arange(0, size, 2, dtype=np.float64) / size)
        columns.append(ids_L3[:, axis, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32))
    phases = jnp.concatenate(columns, axis=-1)
    return jnp.cos(phases), jnp.sin(phases)


def rotate(x_BLHK: Array, cos_Lk: Array, sin_Lk: Array) -> Array:
    """Rotates adjacent channel pairs (2 i, 2 i + 1) of each head; computed in float32, returned in the input dtype."""
    chex.assert_rank(x_BLHK, 4)
    chex.assert_shape([cos_Lk, sin_Lk], (x_BLHK.shape[1], x_BLHK.shape[3] // 2))
    pairs = x_BLHK.astype(jnp.float32).reshape(*x_BLHK.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos_Lk[None, :, None, :], sin_Lk[None, :, None, :]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x_BLHK.shape).astype(x_BLHK.dtype)


def sinusoidal_embedding(scalar_B: Array, size: int, scale: float = 1000.0, max_period: float = 10_000.0) -> Array:
    """Flux's embedding of a timestep or guidance scale: cosines, then sines, of scale * scalar; [B, size], float32."""
    chex.assert_rank(scalar_B, 1)
    half = size // 2
    # The exponent is rounded to float32, as the reference rounds it, and its exponential is exact: a guidance scale
    # times 1000 gives phases that show the last digit of a frequency.
    exponents = np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    phases = (scale * scalar_B.astype(jnp.float32))[:, None] * jnp.asarray(frequencies)[None]
    return jnp.concatenate([jnp.cos(phases), jnp.sin(phases)], axis=-1)
