"""Flow matching: the straight path between data and noise, its velocity, and Euler's and Heun's methods along it."""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from shortcut_jax.core.types import Array, StepVelocity


def per_row(scalar_B: Array, like: Array) -> Array:
    """Reshapes scalars of leading axes, such as one a row [B], so that they broadcast against `like` [B, ...]."""
    return scalar_B.reshape(scalar_B.shape + (1,) * (like.ndim - scalar_B.ndim))


def interpolate(x0_BNC: Array, noise_BNC: Array, t_B: Array) -> Array:
    """x_t = (1 - t) x_0 + t noise, shape [B, N, C]."""
    chex.assert_equal_shape([x0_BNC, noise_BNC])
    chex.assert_shape(t_B, x0_BNC.shape[:1])
    t = per_row(t_B, x0_BNC)
    return (1.0 - t) * x0_BNC + t * noise_BNC


def velocity_target(x0_BNC: Array, noise_BNC: Array) -> Array:
    """The velocity of the straight path, d x_t / d t = noise - x_0."""
    chex.assert_equal_shape([x0_BNC, noise_BNC])
    return noise_BNC - x0_BNC


At = Callable[[Array, Array], Array]
"""(k, x_BNC) -> the velocity at x and the k-th time."""
Step = Callable[[At, Array, Array, Array, Array], tuple[Array, Array]]
"""(at, x_BNC, k, dt, last) -> the state one step further, and the velocity at its beginning."""


def euler_step(at: At, x_BNC: Array, k: Array, dt: Array, last: Array) -> tuple[Array, Array]:
    """X - dt v(x, t)."""
    del last
    v_BNC = at(k, x_BNC)
    return x_BNC - dt * v_BNC, v_BNC


def heun_step(at: At, x_BNC: Array, k: Array, dt: Array, last: Array) -> tuple[Array, Array]:
    """X - dt (v(x, t) + v(x', t')) / 2, x' being Euler's step; the last step is x' itself.

    As algorithm 1 of arXiv 2206.00364 (and diffusers' `FlowMatchHeunDiscreteScheduler`): at t' = 0 the velocity off the
    data is singular. One Euler step among many leaves the method of second order; n steps cost 2 n - 1 evaluations.
    """
    v_BNC = at(k, x_BNC)
    predicted_BNC = x_BNC - dt * v_BNC
    corrected = lambda: x_BNC - dt * (0.5 * (v_BNC + at(k + 1, predicted_BNC)))
    return jax.lax.cond(last, lambda: predicted_BNC, corrected), v_BNC


METHODS: dict[str, Step] = {"euler": euler_step, "heun": heun_step}


def integrate(
    velocity: StepVelocity,
    x_BNC: Array,
    times: Array,
    num_steps: Array,
    step_sizes: Array | None,
    method: str = "euler",
) -> Array:
    """Integrates from `times[0]` to `times[num_steps]`.

    `num_steps` may be traced: one compiled program then serves every step count up to `len(times) - 1`.

    Args:
      velocity: called with t_B and, where `step_sizes` is given, with d_B.
      x_BNC: the state at `times[0]`.
      times: decreasing times, shape [S + 1]; entries after `num_steps` are ignored.
      num_steps: how many steps to take, at most S.
      step_sizes: what a model with a step-size input is conditioned on at each step, shape [S]; None for other models.
      method: of `METHODS`.
    """
    step = _stepper(velocity, times, num_steps, step_sizes, method)
    return jax.lax.fori_loop(0, num_steps, lambda k, x_BNC: step(k, x_BNC)[0], x_BNC)


euler = functools.partial(integrate, method="euler")
heun = functools.partial(integrate, method="heun")


def predictions(
    velocity: StepVelocity,
    x_BNC: Array,
    times: Array,
    num_steps: Array,
    step_sizes: Array | None,
    method: str = "euler",
) -> Array:
    """The clean images x_t - t v(x_t, t) that the steps of `integrate` aim at, and its result: [S + 1, B, N, C].

    Prediction k is made at `times[k]`; entry `num_steps` is the final state, and those behind it are zero.
    """
    step = _stepper(velocity, times, num_steps, step_sizes, method)

    def body(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x_BNC, kept = carry
        next_BNC, v_BNC = step(k, x_BNC)
        return next_BNC, kept.at[k].set(x_BNC - times[k] * v_BNC)

    kept = jnp.zeros((len(times), *x_BNC.shape), x_BNC.dtype)
    x_BNC, kept = jax.lax.fori_loop(0, num_steps, body, (x_BNC, kept))
    return kept.at[num_steps].set(x_BNC)


def _stepper(
    velocity: StepVelocity, times: Array, num_steps: Array, step_sizes: Array | None, method: str
) -> Callable[[Array, Array], tuple[Array, Array]]:
    chex.assert_rank(times, 1)
    if step_sizes is not None:
        chex.assert_shape(step_sizes, (len(times) - 1,))

    def at(k: Array, x_BNC: Array) -> Array:
        t_B = jnp.broadcast_to(times[k], x_BNC.shape[:1])
        d_B = None if step_sizes is None else jnp.broadcast_to(step_sizes[k], x_BNC.shape[:1])
        return velocity(x_BNC, t_B, d_B)

    return lambda k, x_BNC: METHODS[method](at, x_BNC, k, times[k] - times[k + 1], k + 1 == num_steps)
