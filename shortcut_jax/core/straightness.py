"""How straight a velocity field is along its own paths: what few-step training changes, measured."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from shortcut_jax.core.types import Array, StepVelocity

CONSISTENCY_STEPS = (1, 2, 4, 8, 16)
"""Step counts whose steps are compared with two of half their size."""

PATH_STEPS = 2 * max(CONSISTENCY_STEPS)
"""Steps of the path on which that is done."""


class PathMeasures(NamedTuple):
    """How far a field is from one that a single step follows exactly; all zero for straight paths at constant speed.

    Attributes:
      change_K: |v_k - v_(k-1)| / |v_(k-1)| at each step k of the path but the first, mean over rows.
      consistency_L: one step against two of half its size, for each of `CONSISTENCY_STEPS`: the distance between their
        ends over the length of the two together, mean over the steps of a count and over rows. SCFM and shortcut
        models minimise it.
    """

    change_K: Array
    consistency_L: Array


def measure_path(velocity: StepVelocity, noise_BNC: Array, times: Array) -> PathMeasures:
    """Follows Euler's path from noise and measures the field on it.

    Args:
      velocity: v(x, t, d). On the path d is 0; steps that are compared are conditioned on their own sizes.
      noise_BNC: the state at `times[0]`.
      times: decreasing, [PATH_STEPS + 1].
    """
    chex.assert_rank(noise_BNC, 3)
    chex.assert_shape(times, (PATH_STEPS + 1,))
    rows = lambda scalar: jnp.broadcast_to(scalar, noise_BNC.shape[:1])
    norm_B = lambda x_BNC: jnp.sqrt(jnp.sum(jnp.square(x_BNC.astype(jnp.float32)), axis=(1, 2)))
    step = lambda x_BNC, t, end: x_BNC - (t - end) * velocity(x_BNC, rows(t), rows(t - end))

    def along(x_BNC: Array, k: Array) -> tuple[Array, tuple[Array, Array]]:
        v_BNC = velocity(x_BNC, rows(times[k]), rows(0.0))
        return x_BNC - (times[k] - times[k + 1]) * v_BNC, (x_BNC, v_BNC)

    _, (x_KBNC, v_KBNC) = jax.lax.scan(along, noise_BNC, jnp.arange(PATH_STEPS))
    norm_KB = jax.vmap(norm_B)
    change_K = jnp.mean(norm_KB(v_KBNC[1:] - v_KBNC[:-1]) / norm_KB(v_KBNC[:-1]), axis=1)

    def one_against_two(k: Array, n: Array) -> Array:
        x_BNC, t, middle, end = x_KBNC[k], times[k], times[k + n], times[k + 2 * n]
        two_BNC = step(step(x_BNC, t, middle), middle, end)
        return jnp.mean(norm_B(step(x_BNC, t, end) - two_BNC) / norm_B(x_BNC - two_BNC))

    starts = [(level, i) for level, count in enumerate(CONSISTENCY_STEPS) for i in range(count)]
    level, first = jnp.array(starts).T
    counts = jnp.array(CONSISTENCY_STEPS)
    half = PATH_STEPS // (2 * counts[level])
    errors = jax.lax.map(lambda interval: one_against_two(*interval), (first * 2 * half, half))
    return PathMeasures(change_K, jnp.zeros(len(counts)).at[level].add(errors) / counts)
