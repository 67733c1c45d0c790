"""Loss spikes: a step whose gradient is far above what it was lately is not taken."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp

from shortcut_jax.core.setting import DECAY, NOT_NEGATIVE, setting
from shortcut_jax.core.types import Array


@dataclass(frozen=True)
class SpikeSettings:
    """When a step is a spike: its gradient norm is above `factor` times the running mean of the accepted steps' norms.

    It is off by default: the rule is no part of the published recipes, and it would change them.

    Attributes:
      factor: a step is a spike if its gradient norm exceeds this many times the running mean; 0 turns the rule off.
      after: accepted steps before which no step is a spike; the first gradients of a run say little.
      decay: decay of the running mean; 0.99 looks back over about a hundred steps.
    """

    factor: float = setting(0.0, NOT_NEGATIVE)
    after: int = setting(100, NOT_NEGATIVE)
    decay: float = setting(0.99, DECAY)


class SpikeMemory(NamedTuple):
    """What the rule remembers.

    Attributes:
      mean: exponential mean of the gradient norms of accepted steps, not yet corrected for its start at 0 (float32).
      seen: accepted steps in it (int32).
      spikes: steps that were spikes (int32).
    """

    mean: Array
    seen: Array
    spikes: Array


def init_spikes() -> SpikeMemory:
    """Nothing seen."""
    zero = lambda: jnp.zeros((), jnp.int32)
    return SpikeMemory(jnp.zeros(()), zero(), zero())


def is_spike(memory: SpikeMemory, grad_norm: Array, settings: SpikeSettings) -> Array:
    """Whether a finite gradient norm is a spike, by the rule of `SpikeSettings`."""
    seen = memory.seen.astype(jnp.float32)
    mean = memory.mean / (1.0 - settings.decay ** jnp.maximum(seen, 1.0))
    return (memory.seen >= settings.after) & (grad_norm > settings.factor * mean)


def observe(memory: SpikeMemory, grad_norm: Array, settings: SpikeSettings) -> SpikeMemory:
    """The memory after an accepted step."""
    mean = settings.decay * memory.mean + (1.0 - settings.decay) * grad_norm
    return SpikeMemory(mean, memory.seen + 1, memory.spikes)
