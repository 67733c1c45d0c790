"""Dual exponential moving averages of the weights, and when they are restarted.

Averages are float32: in bfloat16 a decay of 0.999 would never move them, since each update is below its resolution.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from shortcut_jax.core.tree import distance
from shortcut_jax.core.types import Array


@dataclass(frozen=True)
class EmaSettings:
    """Decays of both averages, and when they are restarted, that is set to the weights.

    Attributes:
      fast: decay of the fast average.
      slow: decay of the slow average.
      warmup: limits the decay after n updates to (1 + n) / (10 + n), so that early weights are forgotten sooner.
      restart_every: restart every that many optimizer steps; 0 means never.
      restart_auto: restart when `is_stale` says so, instead.
      restart_ratio: how many times the noise of the weights the slow average's lag has to be for that.
    """

    fast: float = 0.99
    slow: float = 0.999
    warmup: bool = False
    restart_every: int = 0
    restart_auto: bool = False
    restart_ratio: float = 1.0


class DualEma(NamedTuple):
    """The fast and the slow average, each of the shape of the weights."""

    fast: Any
    slow: Any


class Lags(NamedTuple):
    """What the restart rule remembers, scalars.

    Attributes:
      fast: how many updates the fast average trails weights that move at a constant speed.
      slow: the same of the slow average.
      restarts: restarts so far (int32).
    """

    fast: Array
    slow: Array
    restarts: Array


def init_ema(params: Any) -> DualEma:
    """Both averages as float32 copies of the weights."""
    # Two separate copies: donated buffers must not alias.
    return DualEma(*(jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params) for _ in range(2)))


def init_lags() -> Lags:
    """No lag: the averages are copies of the weights."""
    return Lags(jnp.zeros(()), jnp.zeros(()), jnp.zeros((), jnp.int32))


def decay_at(decay: float, num_updates: Array, warmup: bool) -> Array:
    """The decay after `num_updates` earlier updates, under the warm-up rule of `EmaSettings.warmup`."""
    num = num_updates.astype(jnp.float32)
    return jnp.minimum(decay, (1.0 + num) / (10.0 + num)) if warmup else jnp.asarray(decay, jnp.float32)


def average(ema: Any, params: Any, decay: Array | float) -> Any:
    """Decay * ema + (1 - decay) * params, leaf by leaf in float32."""
    return jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p.astype(jnp.float32), ema, params)


def staleness(fast_distance: Array, slow_distance: Array, lags: Lags) -> Array:
    """How far the slow average is behind the weights, in units of the weights' own noise.

    Weights that drift by u an update around which they scatter by s lie at a squared distance of s^2 + (u lag)^2 from
    an average. Two averages of different lag give both unknowns: u from the difference, s from the rest.

    Args:
      fast_distance: norm of weights - fast average.
      slow_distance: norm of weights - slow average.
      lags: of both averages.

    Returns:
      u lag_slow / s: what a restart removes (the lag) over what it costs (the noise that averaging had removed). A
      restart lessens the squared error of the slow average exactly where this is above 1.
    """
    fast2, slow2 = jnp.square(fast_distance), jnp.square(slow_distance)
    tiny = jnp.finfo(jnp.float32).tiny
    apart = jnp.square(lags.slow) - jnp.square(lags.fast)
    drift2 = jnp.where(apart > 1e-3, jnp.maximum(slow2 - fast2, 0.0) / jnp.maximum(apart, 1e-3), 0.0)
    noise2 = jnp.maximum(fast2 - drift2 * jnp.square(lags.fast), 1e-6 * fast2)
    return jnp.sqrt(drift2 / jnp.maximum(noise2, tiny)) * lags.slow


def is_stale(ratio: Array, lags: Lags, settings: EmaSettings) -> Array:
    """The automatic restart rule, a boolean: the slow average lags by more than the noise it removes.

    Never before the fast average has forgotten the last restart (1 - 1/e of its final lag): until then the two are one
    average, so that neither is the self-distillation stable nor can `staleness` tell drift from noise.
    """
    settled = lags.fast >= (1.0 - 1.0 / math.e) * settings.fast / (1.0 - settings.fast)
    return settled & (ratio > settings.restart_ratio)


def update_ema(
    ema: DualEma, lags: Lags, params: Any, num_updates: Array, settings: EmaSettings
) -> tuple[DualEma, Lags, Array]:
    """Both averages after one optimizer step.

    Args:
      ema: averages before the step.
      lags: the rule's memory before the step.
      params: weights after the step.
      num_updates: optimizer steps before this one (int32 scalar).
      settings: decays, warm-up and restart.

    Returns:
      Averages, memory, and the staleness by which was decided (0 unless `restart_auto`).
    """
    decays = [decay_at(decay, num_updates, settings.warmup) for decay in (settings.fast, settings.slow)]
    ema = DualEma(*(average(old, params, decay) for old, decay in zip(ema, decays, strict=True)))
    fast, slow = (decay * (lag + 1.0) for lag, decay in zip(lags[:2], decays, strict=True))
    lags, ratio = Lags(fast, slow, lags.restarts), jnp.zeros(())
    if settings.restart_auto:
        ratio = staleness(distance(params, ema.fast), distance(params, ema.slow), lags)
        restart = is_stale(ratio, lags, settings)
    elif settings.restart_every:
        restart = (num_updates + 1) % settings.restart_every == 0
    else:
        return ema, lags, ratio
    choose = lambda e, p: jnp.where(restart, p.astype(jnp.float32), e)
    ema = DualEma(*(jax.tree.map(choose, e, params) for e in ema))
    keep = 1.0 - restart.astype(jnp.float32)
    return ema, Lags(lags.fast * keep, lags.slow * keep, lags.restarts + restart.astype(jnp.int32)), ratio
