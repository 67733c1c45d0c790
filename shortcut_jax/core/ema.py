"""Dual exponential moving averages of the weights, and when they are restarted.

Averages are float32: in bfloat16 a decay of 0.999 would never move them, since each update is below its resolution.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
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
      warmup_ratio: how many times sooner the fast average forgets than the slow one during the warm-up: its decay is
        limited to (1 + n) / (1 + 9 ratio + n). With 1 the two are one average until the limit reaches `fast`, which is
        update 890 for 0.99.
      dual: whether there are two averages; else the fast one has the slow decay and both are the same.
      restart_every: restart every that many optimizer steps; 0 means never.
      restart_auto: restart when `is_stale` says so, instead.
      restart_ratio: how many times the noise of the weights the slow average's lag has to be for that.
    """

    fast: float = 0.99
    slow: float = 0.999
    warmup: bool = False
    warmup_ratio: float = 1.0
    dual: bool = True
    restart_every: int = 0
    restart_auto: bool = False
    restart_ratio: float = 1.0


class DualEma(NamedTuple):
    """The fast and the slow average, each of the shape of the weights."""

    fast: Any
    slow: Any


class Memory(NamedTuple):
    """What the restart rule remembers of both averages, (fast, slow), since the last restart.

    Attributes:
      lag: how many updates they trail weights that move at a constant speed, shape [2].
      noise: their variance where that of the weights is 1 and white in time, shape [2].
      restarts: restarts so far (int32).
    """

    lag: Array
    noise: Array
    restarts: Array


def init_ema(params: Any) -> DualEma:
    """Both averages as float32 copies of the weights."""
    # Two separate copies: donated buffers must not alias.
    return DualEma(*(jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params) for _ in range(2)))


def init_memory() -> Memory:
    """The averages are copies of the weights: no lag, and all of their noise."""
    return Memory(jnp.zeros(2), jnp.ones(2), jnp.zeros((), jnp.int32))


def decay_at(decay: float, num_updates: Array, warmup: bool, ratio: float = 1.0) -> Array:
    """The decay after `num_updates` earlier updates, under the rules of `EmaSettings.warmup` and `.warmup_ratio`."""
    num = num_updates.astype(jnp.float32)
    limit = (1.0 + num) / (1.0 + 9.0 * ratio + num)
    return jnp.minimum(decay, limit) if warmup else jnp.asarray(decay, jnp.float32)


def _decays(num_updates: Array, settings: EmaSettings) -> tuple[Array, Array]:
    """Of the fast and of the slow average."""
    slow = decay_at(settings.slow, num_updates, settings.warmup)
    if not settings.dual:
        return slow, slow
    return decay_at(settings.fast, num_updates, settings.warmup, settings.warmup_ratio), slow


def average(ema: Any, params: Any, decay: Array | float) -> Any:
    """Decay * ema + (1 - decay) * params, leaf by leaf in float32."""
    chex.assert_trees_all_equal_shapes(ema, params)
    return jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p.astype(jnp.float32), ema, params)


def staleness(distance_2: Array, decay_2: Array, memory: Memory) -> Array:
    """How far the slow average is behind the weights, in units of the noise that a restart would bring back.

    Let the weights drift by u an update and scatter around that by s. Then their squared distance from an average is
    s^2 V + u^2 lag^2 with a known V, and two averages of different lag give both unknowns. The slow average is off by
    u lag through the drift and by s sqrt(noise) through the scatter; one that is restarted, by s alone.

    Args:
      distance_2: norms of weights - fast average and of weights - slow average, after the update.
      decay_2: the decays of that update.
      memory: after the update.

    Returns:
      u lag / (s sqrt(1 - noise)) of the slow average: what a restart removes over what it costs. A restart lessens the
      squared error of the slow average exactly where this is above 1.
    """
    chex.assert_shape([distance_2, decay_2], (2,))
    square_2, lag2_2 = jnp.square(distance_2), jnp.square(memory.lag)
    # What the average held before the update, and the weights, both scatter.
    v_2 = memory.noise - jnp.square(1.0 - decay_2) + jnp.square(decay_2)
    determinant = v_2[0] * lag2_2[1] - v_2[1] * lag2_2[0]
    drift2 = jnp.maximum(v_2[0] * square_2[1] - v_2[1] * square_2[0], 0.0)
    scatter2 = jnp.maximum(square_2[0] * lag2_2[1] - square_2[1] * lag2_2[0], 1e-6 * square_2[0] * lag2_2[1])
    cost2 = scatter2 * jnp.maximum(1.0 - memory.noise[1], 0.0)
    known = (determinant > 1e-6) & (cost2 > 0.0)
    return jnp.where(known, jnp.sqrt(drift2 * lag2_2[1] / jnp.where(known, cost2, 1.0)), 0.0)


def is_stale(ratio: Array, memory: Memory, settings: EmaSettings) -> Array:
    """The automatic restart rule, a boolean: the slow average lags by more than the noise it removes.

    Never before the fast average has forgotten the last restart (1 - 1/e of its final lag): until then the two are one
    average, so that neither is the self-distillation stable nor can `staleness` tell drift from scatter.
    """
    settled = memory.lag[0] >= (1.0 - 1.0 / math.e) * settings.fast / (1.0 - settings.fast)
    return settled & (ratio > settings.restart_ratio)


def update_ema(
    ema: DualEma, memory: Memory, params: Any, num_updates: Array, settings: EmaSettings
) -> tuple[DualEma, Memory, Array]:
    """Both averages after one optimizer step.

    Args:
      ema: averages before the step.
      memory: the rule's memory before the step.
      params: weights after the step.
      num_updates: optimizer steps before this one (int32 scalar).
      settings: decays, warm-up and restart.

    Returns:
      Averages, memory, and the staleness by which was decided (0 unless `restart_auto`).
    """
    chex.assert_rank(num_updates, 0)
    decays = _decays(num_updates, settings)
    ema = DualEma(*(average(old, params, decay) for old, decay in zip(ema, decays, strict=True)))
    decay_2 = jnp.stack(decays)
    lag, noise = decay_2 * (memory.lag + 1.0), jnp.square(decay_2) * memory.noise + jnp.square(1.0 - decay_2)
    memory, ratio = Memory(lag, noise, memory.restarts), jnp.zeros(())
    if settings.restart_auto:
        ratio = staleness(jnp.stack([distance(params, e) for e in ema]), decay_2, memory)
        restart = is_stale(ratio, memory, settings)
    elif settings.restart_every:
        restart = (num_updates + 1) % settings.restart_every == 0
    else:
        return ema, memory, ratio
    choose = lambda new, old: jax.tree.map(lambda n, o: jnp.where(restart, n.astype(o.dtype), o), new, old)
    fresh = init_memory()._replace(restarts=memory.restarts + 1)
    return DualEma(*(choose(params, e) for e in ema)), choose(fresh, memory), ratio
