"""The objectives: what each row of a batch is asked to predict. One record each, in one table.

An objective turns clean latents and random draws into `Examples`: an input, its time, and a target through which no
gradient flows. The train step does the rest, the same for all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from shortcut_jax.core.flow import interpolate, per_row, velocity_target
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
from shortcut_jax.core.types import Array, Condition
from shortcut_jax.steps.views import Networks


@dataclass(frozen=True)
class ObjectiveSettings:
    """The objective and its draws.

    Attributes:
      name: a key of `OBJECTIVES`.
      rows: rows of each kind in a group of consecutive rows (unused by `flow`).
      student: the student step counts of self rows.
      shift: the timestep shift of teacher and self rows.
      timestep: how flow rows draw t, `uniform` or `logit_normal`.
      timestep_range: the least and the greatest t of flow rows.
      guidance: range of the guidance scale of a row.
      guide: where it enters, one of `views.GUIDES`.
      teacher_share: probability that a self row learns from the teacher instead.
      teacher_grid: steps of the grid that teacher rows walk on, a multiple of the jumps.
    """

    name: str
    rows: RowGroup
    student: StudentSteps
    shift: ShiftRange
    timestep: str
    guidance: tuple[float, float]
    timestep_range: tuple[float, float] = (0.0, 1.0)
    guide: str = "told"
    teacher_share: float = 0.0
    teacher_grid: int = 32

    @property
    def untaught(self) -> tuple[int, ...]:
        """The student step counts whose targets are made of steps that no row trains."""
        taught = self.teacher_grid // self.student.jumps if self.teacher_share else 0
        return tuple(m for m in self.student.untaught if m * self.student.jumps != taught)


class Draws(NamedTuple):
    """The randomness of every row of a batch, drawn for the global batch at once, whatever the mesh.

    Attributes:
      noise_BNC: standard normal.
      t_B: times of flow rows.
      intervals: student steps of self and teacher rows, each on its own grid.
      guidance_B: guidance scales.
      teacher_B: which of the self rows learn from the teacher; None without one.
    """

    noise_BNC: Array
    t_B: Array
    intervals: Intervals
    guidance_B: Array
    teacher_B: Array | None = None


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


def draw(key: Array, num_rows: int, shape_NC: tuple[int, ...], settings: ObjectiveSettings) -> Draws:
    """All random numbers of one step, for `num_rows` rows of latents of shape [N, C]."""
    keys = DrawKeys(*jax.random.split(key, len(DrawKeys._fields)))
    low, high = settings.guidance
    intervals = draw_intervals(keys.interval, num_rows, settings.student, settings.shift, shape_NC[0])
    guidance_B = jax.random.uniform(keys.guidance, (num_rows,), minval=low, maxval=high)
    teacher_B = None
    if settings.teacher_share:
        key_kind, key_interval = jax.random.split(keys.teacher)
        teacher_B = jax.random.uniform(key_kind, (num_rows,)) < settings.teacher_share
        steps = teacher_steps(settings.teacher_grid, settings.student.jumps)
        fine = draw_intervals(key_interval, num_rows, steps, settings.shift, shape_NC[0])
        choose = lambda a, b: jnp.where(per_row(teacher_B, a), a, b)
        intervals = jax.tree.map(choose, fine, intervals)
    if settings.guide != "told":
        # A flow row learns the velocity of its caption as it is.
        group = row_group(settings)
        is_flow_B = jnp.arange(num_rows) % group.size >= group.self_rows
        guidance_B = jnp.where(is_flow_B, 1.0, guidance_B)
    return Draws(
        noise_BNC=jax.random.normal(keys.noise, (num_rows, *shape_NC)),
        t_B=draw_timesteps(keys.timestep, num_rows, settings.timestep, *settings.timestep_range),
        intervals=intervals,
        guidance_B=guidance_B,
        teacher_B=teacher_B,
    )


def flow_examples(rows: Rows, networks: Networks, settings: ObjectiveSettings) -> Examples:
    """Plain flow matching: noise - data at a random time."""
    del networks, settings
    noise_BNC, t_B = rows.draws.noise_BNC, rows.draws.t_B
    x_BNC = interpolate(rows.x0_BNC, noise_BNC, t_B)
    return Examples(x_BNC, t_B, jnp.zeros_like(t_B), velocity_target(rows.x0_BNC, noise_BNC))


def _interval_start(rows: Rows) -> tuple[Array, Array, Array]:
    """State and time at each row's interval start, and the interval's length."""
    times_BJ = rows.draws.intervals.times_BJ
    t_B = times_BJ[:, 0]
    return interpolate(rows.x0_BNC, rows.draws.noise_BNC, t_B), t_B, t_B - times_BJ[:, -1]


def scfm_examples(rows: Rows, networks: Networks, settings: ObjectiveSettings) -> Examples:
    """Self-distillation without a step-size input (arXiv 2510.17858).

    From x at t the fast average (or the teacher) makes the first jump of a student step and the slow average the
    others; the student learns the mean velocity over all of them, (x - x') / (t - t'), at (x, t).
    """
    del settings
    x_BNC, t_B, length_B = _interval_start(rows)
    first, slow = networks.first(rows.condition, rows.draws.teacher_B), networks.slow(rows.condition)
    times_BJ = rows.draws.intervals.times_BJ
    target_BNC = scfm_target(x_BNC, times_BJ, lambda x, t: first(x, t, None), lambda x, t: slow(x, t, None))
    return Examples(x_BNC, t_B, length_B, target_BNC)


def shortcut_examples(rows: Rows, networks: Networks, settings: ObjectiveSettings) -> Examples:
    """Shortcut models (arXiv 2410.12557): the slow average, told the step size of each jump, makes all of them."""
    times_BJ, count_B = rows.draws.intervals
    x_BNC, t_B, length_B = _interval_start(rows)
    slow = networks.slow(rows.condition)
    return Examples(x_BNC, t_B, length_B, shortcut_target(x_BNC, times_BJ, count_B, slow, settings.student))


RowExamples = Callable[[Rows, Networks, ObjectiveSettings], Examples]


@dataclass(frozen=True)
class Objective:
    """A row of the table of objectives.

    Attributes:
      of_self_rows: what self rows are asked; None where a batch has flow rows alone.
      needs_step_size: whether the network is told its step size.
      takes_teacher: whether self rows may learn from a teacher, and their targets be guided.
    """

    of_self_rows: RowExamples | None = None
    needs_step_size: bool = False
    takes_teacher: bool = False

    @property
    def distils(self) -> bool:
        """Whether there are rows that learn from averages of the network itself."""
        return self.of_self_rows is not None

    def examples(self, rows: Rows, networks: Networks, settings: ObjectiveSettings) -> Examples:
        """What each row is asked, by its kind."""
        if self.of_self_rows is None:
            return flow_examples(rows, networks, settings)
        of_kinds = self.of_self_rows, flow_examples  # in the order of `rows.KINDS`
        parts = zip(of_kinds, split_kinds(rows, settings.rows), settings.rows.counts, strict=True)
        asked = [ask(part, networks, settings) if count else None for ask, part, count in parts]
        return merge_kinds(asked, settings.rows)


OBJECTIVES: dict[str, Objective] = {
    "flow": Objective(),
    "scfm": Objective(scfm_examples, takes_teacher=True),
    "shortcut": Objective(shortcut_examples, needs_step_size=True),
}


def row_group(settings: ObjectiveSettings) -> RowGroup:
    """The groups a batch is made of: without self-distillation there is one kind of row."""
    return settings.rows if OBJECTIVES[settings.name].distils else RowGroup(0, 1)
