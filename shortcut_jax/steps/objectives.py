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
from shortcut_jax.core.schedules import (
    Intervals,
    ShiftRange,
    StudentSteps,
    draw_intervals,
    draw_timesteps,
    teacher_steps,
)
from shortcut_jax.core.shortcut import scfm_target, shortcut_target
from shortcut_jax.core.types import Array, Condition, StepVelocity


@dataclass(frozen=True)
class ObjectiveSettings:
    """The objective and its draws.

    Attributes:
      name: a key of `OBJECTIVES`.
      rows: rows of each kind in a group of consecutive rows (unused by `flow`).
      student: the student step counts of self rows.
      shift: the timestep shift of teacher and self rows.
      timestep: how flow rows draw t, `uniform` or `logit_normal`.
      guidance: range of the guidance scale a row is told, for models with a guidance embedding.
      teacher_grid: steps of the grid that teacher rows walk on, a multiple of the jumps.
    """

    name: str
    rows: RowGroup
    student: StudentSteps
    shift: ShiftRange
    timestep: str
    guidance: tuple[float, float]
    teacher_grid: int = 32


class Draws(NamedTuple):
    """The randomness of every row of a batch, drawn for the global batch at once, whatever the mesh.

    Attributes:
      noise_BNC: standard normal.
      t_B: times of flow rows.
      intervals: student steps of self rows.
      guidance_B: guidance scales.
      teacher: student steps of teacher rows on the teacher's grid; None where the groups have none.
    """

    noise_BNC: Array
    t_B: Array
    intervals: Intervals
    guidance_B: Array
    teacher: Intervals | None = None


class DrawKeys(NamedTuple):
    """One key a stream, each used once a step."""

    noise: Array
    timestep: Array
    interval: Array
    guidance: Array
    teacher: Array


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
    """The networks that make targets, as functions of the condition: `averages.fast(condition)` is a v(x, t, d).

    Attributes:
      fast: the fast EMA of the student.
      slow: the slow EMA of the student.
      teacher: the frozen teacher; None in training from scratch.
    """

    fast: Callable[[Condition], StepVelocity]
    slow: Callable[[Condition], StepVelocity]
    teacher: Callable[[Condition], StepVelocity] | None = None


def draw(key: Array, num_rows: int, shape_NC: tuple[int, ...], settings: ObjectiveSettings) -> Draws:
    """All random numbers of one step, for `num_rows` rows of latents of shape [N, C]."""
    keys = DrawKeys(*jax.random.split(key, len(DrawKeys._fields)))
    low, high = settings.guidance
    teacher = None
    if row_group(settings).teacher_rows:
        steps = teacher_steps(settings.teacher_grid, settings.student.jumps)
        teacher = draw_intervals(keys.teacher, num_rows, steps, settings.shift, shape_NC[0])
    return Draws(
        noise_BNC=jax.random.normal(keys.noise, (num_rows, *shape_NC)),
        t_B=draw_timesteps(keys.timestep, num_rows, settings.timestep),
        intervals=draw_intervals(keys.interval, num_rows, settings.student, settings.shift, shape_NC[0]),
        guidance_B=jax.random.uniform(keys.guidance, (num_rows,), minval=low, maxval=high),
        teacher=teacher,
    )


def flow_examples(rows: Rows, averages: Averages, settings: ObjectiveSettings) -> Examples:
    """Plain flow matching: noise - data at a random time."""
    del averages, settings
    noise_BNC, t_B = rows.draws.noise_BNC, rows.draws.t_B
    x_BNC = interpolate(rows.x0_BNC, noise_BNC, t_B)
    return Examples(x_BNC, t_B, jnp.zeros_like(t_B), velocity_target(rows.x0_BNC, noise_BNC))


def _interval_start(rows: Rows, times_BJ: Array) -> tuple[Array, Array, Array]:
    """State and time at each row's interval start, and the interval's length."""
    t_B = times_BJ[:, 0]
    return interpolate(rows.x0_BNC, rows.draws.noise_BNC, t_B), t_B, t_B - times_BJ[:, -1]


def _scfm_examples(rows: Rows, times_BJ: Array, first: StepVelocity, slow: StepVelocity) -> Examples:
    x_BNC, t_B, length_B = _interval_start(rows, times_BJ)
    target_BNC = scfm_target(x_BNC, times_BJ, lambda x, t: first(x, t, None), lambda x, t: slow(x, t, None))
    return Examples(x_BNC, t_B, length_B, target_BNC)


def _scfm_teacher_examples(rows: Rows, averages: Averages, settings: ObjectiveSettings) -> Examples:
    del settings
    if averages.teacher is None or rows.draws.teacher is None:
        raise ValueError("teacher rows need a teacher")
    teacher, slow = averages.teacher(rows.condition), averages.slow(rows.condition)
    return _scfm_examples(rows, rows.draws.teacher.times_BJ, teacher, slow)


def _scfm_self_examples(rows: Rows, averages: Averages, settings: ObjectiveSettings) -> Examples:
    del settings
    fast, slow = averages.fast(rows.condition), averages.slow(rows.condition)
    return _scfm_examples(rows, rows.draws.intervals.times_BJ, fast, slow)


def _shortcut_self_examples(rows: Rows, averages: Averages, settings: ObjectiveSettings) -> Examples:
    times_BJ, count_B = rows.draws.intervals
    x_BNC, t_B, length_B = _interval_start(rows, times_BJ)
    slow = averages.slow(rows.condition)
    return Examples(x_BNC, t_B, length_B, shortcut_target(x_BNC, times_BJ, count_B, slow, settings.student))


def _no_teacher_examples(rows: Rows, averages: Averages, settings: ObjectiveSettings) -> Examples:
    del rows, averages
    raise ValueError(f"{settings.name} has no teacher rows")


Objective = Callable[[Rows, Averages, ObjectiveSettings], Examples]


def _by_kind(*objectives: Objective) -> Objective:
    """The objective that asks each kind of row, in the order of `rows.KINDS`, for its own examples."""

    def examples(rows: Rows, averages: Averages, settings: ObjectiveSettings) -> Examples:
        parts = zip(objectives, split_kinds(rows, settings.rows), settings.rows.counts, strict=True)
        asked = [objective(part, averages, settings) if count else None for objective, part, count in parts]
        return merge_kinds(asked, settings.rows)

    return examples


OBJECTIVES: dict[str, Objective] = {
    "flow": flow_examples,
    "scfm": _by_kind(_scfm_teacher_examples, _scfm_self_examples, flow_examples),
    "shortcut": _by_kind(_no_teacher_examples, _shortcut_self_examples, flow_examples),
}


def row_group(settings: ObjectiveSettings) -> RowGroup:
    """The groups a batch is made of: plain flow matching has one kind of row."""
    return RowGroup(0, 1) if settings.name == "flow" else settings.rows
