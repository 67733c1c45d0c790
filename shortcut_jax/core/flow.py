"""Flow matching: the straight path between data and noise, its velocity, and Euler's method along it."""

import jax
import jax.numpy as jnp

from shortcut_jax.core.types import Array, StepVelocity


def per_row(scalar_B: Array, like: Array) -> Array:
    """Reshapes one scalar a row [B] so that it broadcasts against `like` [B, ...]."""
    return scalar_B.reshape(scalar_B.shape + (1,) * (like.ndim - scalar_B.ndim))


def interpolate(x0_BNC: Array, noise_BNC: Array, t_B: Array) -> Array:
    """x_t = (1 - t) x_0 + t noise, shape [B, N, C]."""
    t = per_row(t_B, x0_BNC)
    return (1.0 - t) * x0_BNC + t * noise_BNC


def velocity_target(x0_BNC: Array, noise_BNC: Array) -> Array:
    """The velocity of the straight path, d x_t / d t = noise - x_0."""
    return noise_BNC - x0_BNC


def euler(velocity: StepVelocity, x_BNC: Array, times: Array, num_steps: Array, step_sizes: Array | None) -> Array:
    """Integrates from `times[0]` to `times[num_steps]` by Euler's method.

    `num_steps` may be traced: one compiled program then serves every step count up to `len(times) - 1`.

    Args:
      velocity: called with t_B and, where `step_sizes` is given, with d_B.
      x_BNC: the state at `times[0]`.
      times: decreasing times, shape [S + 1]; entries after `num_steps` are ignored.
      num_steps: how many steps to take, at most S.
      step_sizes: what a model with a step-size input is told at each step, shape [S]; None for other models.
    """

    def step(k: Array, x_BNC: Array) -> Array:
        t_B = jnp.broadcast_to(times[k], x_BNC.shape[:1])
        d_B = None if step_sizes is None else jnp.broadcast_to(step_sizes[k], x_BNC.shape[:1])
        return x_BNC - (times[k] - times[k + 1]) * velocity(x_BNC, t_B, d_B)

    return jax.lax.fori_loop(0, num_steps, step, x_BNC)
