"""Shared types, the legend of shape suffixes and the time convention of the whole package.

Shape suffixes (arrays of rank 2 and more; a scalar per row ends in `_B`):
B batch, N image tokens, M text tokens, L = M + N, D width, H heads, K head size, C packed channels, T text width,
V pooled width, J jumps. Unpacked latents are `_BhwC`: rows, columns, channels.

Time: t = 1 is noise, t = 0 is data, x_t = (1 - t) x_0 + t noise, velocity v = noise - x_0, and a sampling step from t
to t' < t is x <- x - (t - t') v(x, t).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Array = jax.Array
Velocity = Callable[[Array, Array], Array]
"""v(x_BNC, t_B) -> v_BNC."""
StepVelocity = Callable[[Array, Array, Array | None], Array]
"""v(x_BNC, t_B, d_B) -> v_BNC, with the step size d_B of shortcut models; None for a model without that input."""


Leaf = Any
"""An array: of JAX inside a step, of numpy on the host, an abstract shape while compiling."""


class Batch(NamedTuple):
    """One global batch of encoded images and captions, all of one size (or one sample of it, on the host)."""

    latents_BhwC: Leaf
    txt_BMT: Leaf
    vec_BV: Leaf


class Condition(NamedTuple):
    """What a velocity is conditioned on; `guidance_B` is None for a model without a guidance embedding."""

    txt_BMT: Leaf
    vec_BV: Leaf
    guidance_B: Leaf | None = None
