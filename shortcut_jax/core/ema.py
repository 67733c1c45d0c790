"""Exponential moving averages of the weights: fast and slow, always float32.

A 0.999 average held in bfloat16 never moves, because each update is below its resolution.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from shortcut_jax.core.types import Array


@dataclass(frozen=True)
class EmaSettings:
    """Decays of both averages.

    Attributes:
      fast: decay of the fast average.
      slow: decay of the slow average.
      warmup: limits the decay after n updates to (1 + n) / (10 + n), so that early weights are forgotten sooner.
      restart_every: every that many steps both averages are set to the weights; 0 means never.
    """

    fast: float = 0.99
    slow: float = 0.999
    warmup: bool = False
    restart_every: int = 0


class DualEma(NamedTuple):
    """The fast and the slow average, each of the shape of the weights."""

    fast: Any
    slow: Any


def init_ema(params: Any) -> DualEma:
    """Both averages as float32 copies of the weights."""
    # Two separate copies: donated buffers must not alias.
    return DualEma(*(jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params) for _ in range(2)))


def decay_at(decay: float, num_updates: Array, warmup: bool) -> Array:
    """The decay after `num_updates` earlier updates, under the warm-up rule of `EmaSettings.warmup`."""
    num = num_updates.astype(jnp.float32)
    return jnp.minimum(decay, (1.0 + num) / (10.0 + num)) if warmup else jnp.asarray(decay, jnp.float32)


def average(ema: Any, params: Any, decay: Array | float) -> Any:
    """Decay * ema + (1 - decay) * params, leaf by leaf in float32."""
    return jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p.astype(jnp.float32), ema, params)


def update_ema(ema: DualEma, params: Any, num_updates: Array, settings: EmaSettings) -> DualEma:
    """Both averages after one optimizer step.

    Args:
      ema: averages before the step.
      params: weights after the step.
      num_updates: optimizer steps before this one (int32 scalar).
      settings: decays, warm-up and restart.
    """
    fast = average(ema.fast, params, decay_at(settings.fast, num_updates, settings.warmup))
    slow = average(ema.slow, params, decay_at(settings.slow, num_updates, settings.warmup))
    if not settings.restart_every:
        return DualEma(fast, slow)
    restart = (num_updates + 1) % settings.restart_every == 0
    choose = lambda e, p: jnp.where(restart, p.astype(jnp.float32), e)
    return DualEma(jax.tree.map(choose, fast, params), jax.tree.map(choose, slow, params))
