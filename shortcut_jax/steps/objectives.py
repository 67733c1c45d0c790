"""The objectives: what each row of a batch is asked to predict. One function each, in one table.

An objective turns clean latents and random draws into `Examples`: an input, its time, and a target through which no
gradient flows. The train step does the rest, the same for all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from shortcut_jax.core.flow import interpolate, velocity_target
from shortcut_jax.core.rows import RowGroup, merge_kinds, split_kinds
from shortcut_jax.core.schedules import Intervals, ShiftRange, StudentSteps, draw_intervals, draw_timesteps
from shortcut_jax.core.shortcut import scfm_target, shortcut_target
from shortcut_jax.core.types import Array, Condition, StepVelocity


@dataclass(frozen=True)
class ObjectiveSettings:
    """The objective and its draws.

    Attributes:
      name: a key of `OBJECTIVES`.
      rows: self and flow rows of each group of consecutive rows (unused by `flow`).
      student: the student step counts of self rows.
      shift: the timestep shift of self rows.
      timestep: how flow rows draw t, `uniform` or `logit_normal`.
      guidance: range of the guidance scale a row is told, for models with a guidance embedding.
    """

    name: str
    rows: RowGroup
    student: StudentSteps
    shift: ShiftRange
    timestep: str
    guidance: tuple[float, float]


class Draws(NamedTuple):
    """The randomness of every row of a batch, drawn for the global batch at once, whatever the mesh.

    Attributes:
      noise_BNC: standard normal.
      t_B: times of flow rows.
      intervals: student steps of self rows.
      guidance_B: guidance scales.
    """

    noise_BNC: Array
    t_B: Array
    intervals: Intervals
    guidance_B: Array


class DrawKeys(NamedTuple):
    """One key a stream, each used once a step."""

    noise: Array
    timestep: Array
    interval: Array
    guidance: Array


class Rows(NamedTuple):
    """Clean latents, conditions and draws of the same rows."""

    x0_BNC: Array
    condition: Condition
    draws: Draws


class Examples(NamedTuple):
    """What the student sees and should answer; `step_B` is the step size it is told, 0 for flow rows."""

    x_BNC: Array
    t_B: Array
    step_B: Array
    target_BNC: Array


class Averages(NamedTuple):
    """The fast and slow EMA as functions of the condition: `averages.fast(condition)` is a velocity v(x, t, d)."""

    fast: Callable[[Condition], StepVelocity]
    slow: Callable[[Condition], StepVelocity]


def draw(key: Array, num_rows: int, shape_NC: tuple[int, ...], settings: ObjectiveSettings) -> Draws:
    """All random numbers of one step, for `num_rows` rows of latents of shape [N, C]."""
    keys = DrawKeys(*jax.random.split(key, len(DrawKeys._fields)))
    low, high = settings.guidance
    return Draws(
        noise_BNC=jax.random.normal(keys.noise, (num_rows, *shape_NC)),
        t_B=draw_timesteps(keys.timestep, num_rows, settings.timestep),
        intervals=draw_intervals(keys.interval, num_rows, settings.student, settings.shift, shape_NC[0]),
        guidance_B=jax.random.uniform(keys.guidance, (num_rows,), minval=low, maxval=high),
    )


def flow_examples(rows: Rows, averages: Averages, settings: ObjectiveSettings) -> Examples:
    """Plain flow matching: noise - data at a random time."""
    del averages, settings
    noise_BNC, t_B = rows.draws.noise_BNC, rows.draws.t_B
    x_BNC = interpolate(rows.x0_BNC, noise_BNC, t_B)
    return Examples(x_BNC, t_B, jnp.zeros_like(t_B), velocity_target(rows.x0_BNC, noise_BNC))


def _interval_start(rows: Rows) -> tuple[Array, Array, Array]:
    """State and time at each row's interval start, and the interval's length."""
    times_BJ = rows.draws.intervals.times_BJ
    t_B = times_BJ[:, 0]
    return interpolate(rows.x0_BNC, rows.draws.noise_BNC, t_B), t_B, t_B - times_BJ[:, -1]


def _scfm_self_examples(rows: Rows, averages: Averages, settings: ObjectiveSettings) -> Examples:
    del settings
    x_BNC, t_B, length_B = _interval_start(rows)
    fast, slow = averages.fast(rows.condition), averages.slow(rows.condition)
    target_BNC = scfm_target(
        x_BNC, rows.draws.intervals.times_BJ, lambda x, t: fast(x, t, None), lambda x, t: slow(x, t, None)
    )
    return Examples(x_BNC, t_B, length_B, target_BNC)


def _shortcut_self_examples(rows: Rows, averages: Averages, settings: ObjectiveSettings) -> Examples:
    x_BNC, t_B, length_B = _interval_start(rows)
    slow = averages.slow(rows.condition)
    times_BJ, count_B = rows.draws.intervals
    return Examples(x_BNC, t_B, length_B, shortcut_target(x_BNC, times_BJ, count_B, slow, settings.student))


def _mixed(self_examples: Callable[..., Examples]) -> Callable[..., Examples]:
    def examples(rows: Rows, averages: Averages, settings: ObjectiveSettings) -> Examples:
        if not settings.rows.self_rows:
            return flow_examples(rows, averages, settings)
        if not settings.rows.flow_rows:
            return self_examples(rows, averages, settings)
        self_part, flow_part = split_kinds(rows, settings.rows)
        return merge_kinds(
            self_examples(self_part, averages, settings), flow_examples(flow_part, averages, settings), settings.rows
        )

    return examples


OBJECTIVES: dict[str, Callable[[Rows, Averages, ObjectiveSettings], Examples]] = {
    "flow": flow_examples,
    "scfm": _mixed(_scfm_self_examples),
    "shortcut": _mixed(_shortcut_self_examples),
}


def row_group(settings: ObjectiveSettings) -> RowGroup:
    """The groups a batch is made of: plain flow matching has one kind of row."""
    return RowGroup(0, 1) if settings.name == "flow" else settings.rows
