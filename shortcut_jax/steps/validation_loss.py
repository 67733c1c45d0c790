"""Validation: the flow-matching loss at fixed times with fixed noise, so that it compares between runs and steps."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from shortcut_jax.core.flow import interpolate, velocity_target
from shortcut_jax.core.latents import patchify
from shortcut_jax.core.shortcut import squared_error
from shortcut_jax.core.types import Array, Batch, Condition
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.steps.networks import make_velocity

RULES: dict[str, tuple[float, ...]] = {
    "mlperf": tuple(k / 8 for k in range(8)),
    "midpoints": tuple((2 * k + 1) / 16 for k in range(8)),
}
"""The times of a validation: sample i is asked at time i modulo 8 of its rule's list.

`mlperf` is the rule of MLPerf Training's Flux.1 benchmark (0, 1/8 ... 7/8), `midpoints` takes the middle of each
eighth, as torchtitan does. Their losses do not compare with each other.
"""


class Validated(NamedTuple):
    """Sums over the samples of a batch, by time.

    Attributes:
      loss_T: of the mean squared errors of the velocity.
      count_T: of samples.
    """

    loss_T: Array
    count_T: Array


@functools.lru_cache(maxsize=16)
def make_validation(cfg: FluxConfig, rule: str, seed: int, guidance: float) -> Callable[..., Validated]:
    """A function (params, batch, index_B) -> `Validated`.

    Sample `index_B` of the validation set has its own time and noise, whatever batch it is in; -1 is padding and counts
    nothing. A model with a guidance embedding is conditioned on `guidance`, one with a step-size input d = 0.
    """
    times_T = jnp.asarray(RULES[rule], jnp.float32)
    key = jax.random.key(seed)

    def validate(params: Any, batch: Batch, index_B: Array) -> Validated:
        chex.assert_shape(index_B, batch.latents_BhwC.shape[:1])
        x0_BNC = patchify(batch.latents_BhwC.astype(jnp.float32))
        velocity_of = make_velocity(cfg, *batch.latents_BhwC.shape[1:3])
        noise = lambda index: jax.random.normal(jax.random.fold_in(key, index), x0_BNC.shape[1:])
        noise_BNC = cfg.constrain(jax.vmap(noise)(index_B), ("batch", None, None))
        which_B = index_B % len(times_T)
        t_B = times_T[which_B]
        guidance_B = jnp.full(t_B.shape, guidance) if cfg.guidance else None
        velocity = velocity_of(params, Condition(batch.txt_BMT, batch.vec_BV, guidance_B))
        v_BNC = velocity(interpolate(x0_BNC, noise_BNC, t_B), t_B, jnp.zeros_like(t_B) if cfg.step_size else None)
        error_B = squared_error(v_BNC, velocity_target(x0_BNC, noise_BNC))
        asked_BT = (which_B[:, None] == jnp.arange(len(times_T))) & (index_B >= 0)[:, None]
        return Validated(jnp.sum(jnp.where(asked_BT, error_B[:, None], 0.0), axis=0), jnp.sum(asked_BT, axis=0))

    return validate
