"""Dual exponential moving averages of the weights, and their restarts.

Averages are float32: in bfloat16 a decay of 0.999 would never move them, since each update is below its resolution.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from shortcut_jax.core.setting import DECAY, NOT_NEGATIVE, setting
from shortcut_jax.core.types import Array


@dataclass(frozen=True)
class EmaSettings:
    """Decays of both EMAs, and when they are restarted, that is set to the weights.

    Attributes:
      fast: decay of the fast EMA.
      slow: decay of the slow EMA.
      warmup: limits the decay after n updates to (1 + n) / (10 + n), so that early weights are forgotten sooner.
      warmup_ratio: how many times sooner the fast EMA forgets than the slow one during the warm-up: its decay is
        limited to (1 + n) / (1 + 9 ratio + n). With 1 the two are one EMA until the limit reaches `fast`, which is
        update 890 for 0.99.
      dual: whether there are two EMAs; else the fast one has the slow decay and both are the same.
      restart_every: restart every that many optimizer steps; 0 means never.
    """

    fast: float = setting(0.99, DECAY)
    slow: float = setting(0.999, DECAY)
    warmup: bool = False
    warmup_ratio: float = 1.0
    dual: bool = True
    restart_every: int = setting(0, NOT_NEGATIVE)


class DualEma(NamedTuple):
    """The fast and the slow EMA, each of the shape of the weights."""

    fast: Any
    slow: Any


def init_ema(params: Any) -> DualEma:
    """Both EMAs as float32 copies of the weights."""
    # Two separate copies: donated buffers must not alias.
    return DualEma(*(jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params) for _ in range(2)))


def decay_at(decay: float, num_updates: Array, warmup: bool, ratio: float = 1.0) -> Array:
    """The decay after `num_updates` earlier updates, under the rules of `EmaSettings.warmup` and `.warmup_ratio`."""
    num = num_updates.astype(jnp.float32)
    limit = (1.0 + num) / (1.0 + 9.0 * ratio + num)
    return jnp.minimum(decay, limit) if warmup else jnp.asarray(decay, jnp.float32)


def _decays(num_updates: Array, settings: EmaSettings) -> tuple[Array, Array]:
    """Of the fast and of the slow EMA."""
    slow = decay_at(settings.slow, num_updates, settings.warmup)
    if not settings.dual:
        return slow, slow
    return decay_at(settings.fast, num_updates, settings.warmup, settings.warmup_ratio), slow


def average(ema: Any, params: Any, decay: Array | float) -> Any:
    """Decay * ema + (1 - decay) * params, leaf by leaf in float32."""
    chex.assert_trees_all_equal_shapes(ema, params)
    return jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p.astype(jnp.float32), ema, params)


def update_ema(ema: DualEma, params: Any, num_updates: Array, settings: EmaSettings) -> DualEma:
    """Both EMAs after one optimizer step.

    Args:
      ema: averages before the step.
      params: weights after the step.
      num_updates: optimizer steps before this one (int32 scalar).
      settings: decays, warm-up and restart.
    """
    chex.assert_rank(num_updates, 0)
    ema = DualEma(*(average(old, params, d) for old, d in zip(ema, _decays(num_updates, settings), strict=True)))
    if not settings.restart_every:
        return ema
    restart = (num_updates + 1) % settings.restart_every == 0
    return jax.tree.map(lambda p, e: jnp.where(restart, p.astype(e.dtype), e), DualEma(params, params), ema)


def num_restarts(num_updates: Array, settings: EmaSettings) -> Array:
    """Restarts in that many optimizer steps (int32)."""
    return num_updates // settings.restart_every if settings.restart_every else jnp.zeros((), jnp.int32)
