"""Targets of self-distillation: SCFM, shortcut models, alpha-Flow and MeanFlow.

The first two replace one large step by the composition of smaller ones: SCFM (arXiv 2510.17858) asks it of the
velocity field itself, a shortcut model (arXiv 2410.12557) conditions the network on the step size. The other two learn
the average velocity over an interval from the velocity at its start, by a step of finite length (alpha-Flow, arXiv
2510.20771) or by the derivative along the path (MeanFlow, arXiv 2505.13447).
"""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

from shortcut_jax.core.flow import per_row
from shortcut_jax.core.schedules import StudentSteps
from shortcut_jax.core.types import Array, StepVelocity, Velocity


def jump_target(x_BNC: Array, times_BJ: Array, velocities: Sequence[Velocity]) -> Array:
    """The straight line over an interval: sum_j dt_j v_j / sum_j dt_j, walking through the velocities in turn.

    Args:
      x_BNC: the state at the interval's start, `times_BJ[:, 0]`.
      times_BJ: decreasing times, shape [B, J + 1].
      velocities: J velocity functions; the j-th makes the jump from time j to time j + 1.

    Returns:
      The target velocity [B, N, C] in float32, through which no gradient flows.
    """
    chex.assert_shape(times_BJ, (len(x_BNC), len(velocities) + 1))
    path_BNC = jnp.zeros_like(x_BNC)
    for j, velocity in enumerate(velocities):
        dt = per_row(times_BJ[:, j] - times_BJ[:, j + 1], x_BNC)
        path_BNC = path_BNC + dt * velocity(x_BNC - path_BNC, times_BJ[:, j])
    return jax.lax.stop_gradient(path_BNC / per_row(times_BJ[:, 0] - times_BJ[:, -1], x_BNC))


def scfm_target(x_BNC: Array, times_BJ: Array, first: Velocity, slow: Velocity) -> Array:
    """SCFM's target: the first J / 2 jumps by `first` (teacher or fast EMA), the other J / 2 by the slow EMA."""
    chex.assert_shape(times_BJ, (len(x_BNC), None))
    half = (times_BJ.shape[1] - 1) // 2
    return jump_target(x_BNC, times_BJ, [first] * half + [slow] * half)


def shortcut_target(
    x_BNC: Array, times_BJ: Array, count_B: Array, velocity: StepVelocity, steps: StudentSteps
) -> Array:
    """The shortcut model's target: J smaller steps by the EMA network, each conditioned on its own step size.

    Where no row trains the smaller step (J m is not a student step count), the network is conditioned on d = 0, the
    instantaneous velocity, as the original does at its finest level.
    """
    chex.assert_shape(count_B, x_BNC.shape[:1])
    taught_B = jnp.isin(count_B * steps.jumps, jnp.asarray(steps.counts))

    def jump(j: int) -> Velocity:
        d_B = jnp.where(taught_B, times_BJ[:, j] - times_BJ[:, j + 1], 0.0)
        return lambda x_BNC, t_B: velocity(x_BNC, t_B, d_B)

    return jump_target(x_BNC, times_BJ, [jump(j) for j in range(times_BJ.shape[1] - 1)])


def alpha_target(x_BNC: Array, t_B: Array, d_B: Array, v_BNC: Array, average: StepVelocity, alpha_B: Array) -> Array:
    """alpha-Flow's target: the share alpha of the interval with v, the rest with the average velocity over that rest.

    alpha v + (1 - alpha) u(x - alpha d v, t - alpha d, (1 - alpha) d). At alpha = 1 it is v, flow matching; at 1/2,
    with u(x, t, d / 2) in place of v, a shortcut model's; as alpha goes to 0, (target - u) / alpha goes to what
    MeanFlow's target differs from u by.

    Args:
      x_BNC: the state at the interval's start.
      t_B: its time.
      d_B: length of the interval.
      v_BNC: velocity at the start.
      average: u, the average velocity over the interval of a given length.
      alpha_B: in (0, 1].

    Returns:
      The target velocity [B, N, C], through which no gradient flows.
    """
    chex.assert_equal_shape([x_BNC, v_BNC])
    chex.assert_shape([t_B, d_B, alpha_B], x_BNC.shape[:1])
    first_B = alpha_B * d_B
    rest_BNC = average(x_BNC - per_row(first_B, x_BNC) * v_BNC, t_B - first_B, d_B - first_B)
    alpha = per_row(alpha_B, x_BNC)
    return jax.lax.stop_gradient(alpha * v_BNC + (1.0 - alpha) * rest_BNC)


def meanflow_target(x_BNC: Array, t_B: Array, d_B: Array, v_BNC: Array, average: StepVelocity) -> Array:
    """MeanFlow's target v - d du/dt, which the average velocity u over [t - d, t] fulfils.

    du/dt is the derivative along the path with the interval's end in place: one forward-mode derivative with the
    tangents (v, 1, 1) of (x, t, d). Arguments as those of `alpha_target`; no gradient flows through the target.
    """
    chex.assert_equal_shape([x_BNC, v_BNC])
    chex.assert_shape([t_B, d_B], x_BNC.shape[:1])
    ones_B = jnp.ones_like(t_B)
    _, slope_BNC = jax.jvp(average, (x_BNC, t_B, d_B), (v_BNC, ones_B, ones_B))
    return jax.lax.stop_gradient(v_BNC - per_row(d_B, x_BNC) * slope_BNC)


def squared_error(prediction_BNC: Array, target_BNC: Array) -> Array:
    """Mean squared error of each row in float32, shape [B]."""
    chex.assert_equal_shape([prediction_BNC, target_BNC])  # subtraction alone would broadcast them
    error_BNC = prediction_BNC.astype(jnp.float32) - target_BNC.astype(jnp.float32)
    return jnp.mean(jnp.square(error_BNC), axis=tuple(range(1, error_BNC.ndim)))


def adaptive_weight(error_B: Array, size: int, power: float) -> Array:
    """MeanFlow's weight of each row, (|error|^2 + 0.001)^-power, through which no gradient flows.

    At power 1 a row's gradient no longer grows with its error.

    Args:
      error_B: mean squared error of each row.
      size: values of a row, so that |error|^2 is their sum.
      power: at least 0; 0 weighs all rows alike.
    """
    return jax.lax.stop_gradient((size * error_B + 1e-3) ** -power)
