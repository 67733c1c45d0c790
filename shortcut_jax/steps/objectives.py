"""The objectives: what each row of a batch is asked to predict. One record each, in one table.

An objective turns clean latents and random draws into `Examples`: an input, its time, and a target through which no
gradient flows. The train step does the rest, the same for all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from shortcut_jax.core.batch_split import RowGroup, merge_kinds, split_kinds
from shortcut_jax.core.flow import interpolate, per_row, velocity_target
from shortcut_jax.core.schedules import (
    AlphaSchedule,
    Intervals,
    ShiftRange,
    StudentSteps,
    draw_intervals,
    draw_spans,
    draw_timesteps,
    earlier,
    start_of,
    teacher_steps,
)
from shortcut_jax.core.shortcut import alpha_target, meanflow_target, scfm_target, shortcut_target
from shortcut_jax.core.types import Array, Condition, StepVelocity
from shortcut_jax.steps.networks import Networks


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
      guidance_mode: where it enters, one of `networks.GUIDANCE_MODES`.
      teacher_share: probability that a self row learns from the teacher instead.
      teacher_grid: steps of the grid that teacher rows walk on, a multiple of the jumps.
      rolled_steps: steps of the slow EMA from noise to where a rolled row begins.
      alpha: alpha-Flow's curriculum.
      adaptive_power: of `core.shortcut.adaptive_weight`.
    """

    name: str
    rows: RowGroup
    student: StudentSteps
    shift: ShiftRange
    timestep: str
    guidance: tuple[float, float]
    timestep_range: tuple[float, float] = (0.0, 1.0)
    guidance_mode: str = "embedded"
    teacher_share: float = 0.0
    teacher_grid: int = 32
    rolled_steps: int = 4
    alpha: AlphaSchedule = field(default_factory=AlphaSchedule)
    adaptive_power: float = 0.0

    @property
    def unsupervised_counts(self) -> tuple[int, ...]:
        """The student step counts whose targets are made of steps that no row trains."""
        taught = self.teacher_grid // self.student.jumps if self.teacher_share else 0
        return tuple(m for m in self.student.unsupervised_counts if m * self.student.jumps != taught)


class Draws(NamedTuple):
    """The randomness of every row of a batch, drawn for the global batch at once, whatever the mesh.

    Attributes:
      noise_BNC: standard normal.
      t_B: times of flow rows.
      intervals: student steps of self and teacher rows, each on its own grid.
      guidance_B: guidance scales.
      teacher_B: which of the self and rolled rows learn from the teacher; None without one.
      alpha_B: alpha-Flow's alpha; None for the other objectives.
    """

    noise_BNC: Array
    t_B: Array
    intervals: Intervals
    guidance_B: Array
    teacher_B: Array | None = None
    alpha_B: Array | None = None


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
    """What the student sees and should answer.

    Attributes:
      x_BNC: the state.
      t_B: its time.
      step_B: the step size that the student is conditioned on, 0 for flow rows.
      target_BNC: the velocity it should answer with.
      weight_B: of each row in the loss; None for 1.
    """

    x_BNC: Array
    t_B: Array
    step_B: Array
    target_BNC: Array
    weight_B: Array | None = None


def draw(
    key: Array, num_rows: int, shape_NC: tuple[int, ...], settings: ObjectiveSettings, progress: Array | float = 0.0
) -> Draws:
    """All random numbers of one step, for `num_rows` rows of latents of shape [N, C].

    `progress` is the share of the run that is done.
    """
    keys = DrawKeys(*jax.random.split(key, len(DrawKeys._fields)))
    low, high = settings.guidance
    objective = OBJECTIVES[settings.name]
    if objective.any_interval:
        intervals = draw_spans(keys.interval, num_rows, settings.timestep)
    else:
        intervals = draw_intervals(keys.interval, num_rows, settings.student, settings.shift, shape_NC[0])
    guidance_B = jax.random.uniform(keys.guidance, (num_rows,), minval=low, maxval=high)
    teacher_B = None
    if settings.teacher_share:
        key_kind, key_interval = jax.random.split(keys.teacher)
        teacher_B = jax.random.uniform(key_kind, (num_rows,)) < settings.teacher_share
        student = settings.student
        steps = teacher_steps(settings.teacher_grid, student.jumps, student.start, student.scaled)
        fine = draw_intervals(key_interval, num_rows, steps, settings.shift, shape_NC[0])
        choose = lambda a, b: jnp.where(per_row(teacher_B, a), a, b)
        intervals = jax.tree.map(choose, fine, intervals)
    if settings.guidance_mode != "embedded":
        # A flow row learns the velocity of its caption as it is.
        group = row_group(settings)
        is_flow_B = jnp.arange(num_rows) % group.size >= group.distilled
        guidance_B = jnp.where(is_flow_B, 1.0, guidance_B)
    return Draws(
        noise_BNC=jax.random.normal(keys.noise, (num_rows, *shape_NC)),
        t_B=draw_timesteps(keys.timestep, num_rows, settings.timestep, *settings.timestep_range),
        intervals=intervals,
        guidance_B=guidance_B,
        teacher_B=teacher_B,
        alpha_B=jnp.full(num_rows, settings.alpha.at(jnp.asarray(progress))) if objective.takes_alpha else None,
    )


def flow_examples(rows: Rows, networks: Networks, settings: ObjectiveSettings) -> Examples:
    """Plain flow matching: noise - data at a random time."""
    del networks, settings
    noise_BNC, t_B = rows.draws.noise_BNC, rows.draws.t_B
    x_BNC = interpolate(rows.x0_BNC, noise_BNC, t_B)
    return Examples(x_BNC, t_B, jnp.zeros_like(t_B), velocity_target(rows.x0_BNC, noise_BNC))


def interval_start(rows: Rows) -> tuple[Array, Array, Array]:
    """State and time at each row's interval start, and the interval's length."""
    times_BJ = rows.draws.intervals.times_BJ
    t_B = times_BJ[:, 0]
    return interpolate(rows.x0_BNC, rows.draws.noise_BNC, t_B), t_B, t_B - times_BJ[:, -1]


def at_jump_times(velocity: StepVelocity, rows: Rows, settings: ObjectiveSettings) -> Callable[[Array, Array], Array]:
    """A velocity without a step-size input, v(x, t), as the jumps of rows take it.

    A jump is a step of the sampler with J times as many steps. With a `multistep_start` below 1 that one begins
    earlier, or has earlier times throughout, than the sampler of the row's own step count, whose times `times_BJ` are.
    """
    student, count_B = settings.student, rows.draws.intervals.count_B
    own_B, finer_B = (start_of(count, student.start) for count in (count_B, count_B * student.jumps))
    at_finer = lambda t_B: t_B * (finer_B / own_B) if student.scaled else jnp.minimum(t_B, finer_B)
    return lambda x_BNC, t_B: velocity(x_BNC, at_finer(t_B), None)


def scfm_examples(rows: Rows, networks: Networks, settings: ObjectiveSettings) -> Examples:
    """Self-distillation without a step-size input (arXiv 2510.17858).

    From x at t the fast EMA (or the teacher) makes the first half of the J jumps of a student step from t to t', and
    the slow EMA the others: x_{j+1} = x_j - (t_j - t_{j+1}) v_j(x_j, t_j), x_0 = x. The student learns the mean
    velocity over all of them, (x - x_J) / (t - t'), at (x, t); for J = 2 that is (v_fast(x, t) + v_slow(x_1, t_1)) / 2.
    A jump is a step of the sampler with J times as many steps, at the times that this one has (`at_jump_times`).
    """
    return _scfm_from(interval_start(rows)[0], rows, networks, settings)


def rolled_examples(rows: Rows, networks: Networks, settings: ObjectiveSettings) -> Examples:
    """The same from points that the slow EMA itself reaches from the row's noise: no image enters.

    Each walks from t = 1 to the interval's start in `rolled_steps` equal steps of Euler's method.
    """
    slow, start_B = networks.slow(rows.condition), rows.draws.intervals.times_BJ[:, 0]
    student = settings.student
    size_B = (1.0 - start_B) / settings.rolled_steps

    def step(x_BNC: Array, k: Array) -> tuple[Array, None]:
        t_B = earlier(1.0 - k * size_B, settings.rolled_steps, student.start, student.scaled)
        return x_BNC - per_row(size_B, x_BNC) * slow(x_BNC, t_B, None), None

    steps = jnp.arange(settings.rolled_steps, dtype=jnp.float32)
    x_BNC, _ = jax.lax.scan(step, rows.draws.noise_BNC, steps)
    return _scfm_from(jax.lax.stop_gradient(x_BNC), rows, networks, settings)


def _scfm_from(x_BNC: Array, rows: Rows, networks: Networks, settings: ObjectiveSettings) -> Examples:
    times_BJ = rows.draws.intervals.times_BJ
    velocities = networks.first(rows.condition, rows.draws.teacher_B), networks.slow(rows.condition)
    first, slow = (at_jump_times(velocity, rows, settings) for velocity in velocities)
    target_BNC = scfm_target(x_BNC, times_BJ, first, slow)
    return Examples(x_BNC, times_BJ[:, 0], times_BJ[:, 0] - times_BJ[:, -1], target_BNC)


def shortcut_examples(rows: Rows, networks: Networks, settings: ObjectiveSettings) -> Examples:
    """Shortcut models (arXiv 2410.12557): the slow EMA, with the size of each jump as its input, makes all of them.

    For J = 2 jumps of size d from t to t - 2 d, the target of v(x, t, 2 d) is (v(x, t, d) + v(x_1, t - d, d)) / 2,
    where x_1 = x - d v(x, t, d).
    """
    times_BJ, count_B = rows.draws.intervals
    x_BNC, t_B, length_B = interval_start(rows)
    slow = networks.slow(rows.condition)
    return Examples(x_BNC, t_B, length_B, shortcut_target(x_BNC, times_BJ, count_B, slow, settings.student))


def alpha_examples(rows: Rows, networks: Networks, settings: ObjectiveSettings) -> Examples:
    """alpha-Flow (arXiv 2510.20771): see `core.shortcut.alpha_target`; the average velocity is the slow EMA's.

    A row weighs 1 / alpha, which undoes that its error is alpha times as large.
    """
    del settings
    x_BNC, t_B, length_B = interval_start(rows)
    v_BNC = velocity_target(rows.x0_BNC, rows.draws.noise_BNC)
    alpha_B = cast(Array, rows.draws.alpha_B)
    target_BNC = alpha_target(x_BNC, t_B, length_B, v_BNC, networks.slow(rows.condition), alpha_B)
    return Examples(x_BNC, t_B, length_B, target_BNC, 1.0 / alpha_B)


def meanflow_examples(rows: Rows, networks: Networks, settings: ObjectiveSettings) -> Examples:
    """MeanFlow (arXiv 2505.13447): see `core.shortcut.meanflow_target`; the network that learns is its own EMA."""
    del settings
    x_BNC, t_B, length_B = interval_start(rows)
    v_BNC = velocity_target(rows.x0_BNC, rows.draws.noise_BNC)
    target_BNC = meanflow_target(x_BNC, t_B, length_B, v_BNC, networks.forward(rows.condition))
    return Examples(x_BNC, t_B, length_B, target_BNC)


RowExamples = Callable[[Rows, Networks, ObjectiveSettings], Examples]


@dataclass(frozen=True)
class Objective:
    """A row of the table of objectives.

    Attributes:
      of_self_rows: makes the examples of self rows; None where a batch has flow rows alone.
      of_rolled_rows: makes those of rolled rows; None where there can be none.
      needs_step_size: whether the network is conditioned on its step size.
      takes_teacher: whether self rows may learn from a teacher, and their targets be guided.
      takes_alpha: whether `ObjectiveSettings.alpha` is for it.
      any_interval: whether self rows span any two times, in place of a student step.
      forward_mode: whether it differentiates the network in forward mode.
      target_passes: forward passes that the target of a self row takes; None for one a jump.
    """

    of_self_rows: RowExamples | None = None
    of_rolled_rows: RowExamples | None = None
    needs_step_size: bool = False
    takes_teacher: bool = False
    takes_alpha: bool = False
    any_interval: bool = False
    forward_mode: bool = False
    target_passes: int | None = None

    @property
    def distils(self) -> bool:
        """Whether there are rows that learn from EMAs of the network itself."""
        return self.of_self_rows is not None

    def examples(self, rows: Rows, networks: Networks, settings: ObjectiveSettings) -> Examples:
        """Input and target of each row, by its kind."""
        if self.of_self_rows is None:
            return flow_examples(rows, networks, settings)
        of_kinds = self.of_self_rows, self.of_rolled_rows, flow_examples  # in the order of `rows.KINDS`
        parts = zip(of_kinds, split_kinds(rows, settings.rows), settings.rows.counts, strict=True)
        made = [make(part, networks, settings) if make and count else None for make, part, count in parts]
        if any(examples is not None and examples.weight_B is not None for examples in made):
            made = [
                e if e is None or e.weight_B is not None else e._replace(weight_B=jnp.ones_like(e.t_B)) for e in made
            ]
        return merge_kinds(made, settings.rows)


OBJECTIVES: dict[str, Objective] = {
    "flow": Objective(),
    "scfm": Objective(scfm_examples, rolled_examples, takes_teacher=True),
    "shortcut": Objective(shortcut_examples, needs_step_size=True),
    "alpha": Objective(alpha_examples, needs_step_size=True, takes_alpha=True, any_interval=True, target_passes=1),
    "meanflow": Objective(
        meanflow_examples, needs_step_size=True, any_interval=True, forward_mode=True, target_passes=2
    ),
}


def row_group(settings: ObjectiveSettings) -> RowGroup:
    """The groups a batch is made of: without self-distillation there is one kind of row."""
    return settings.rows if OBJECTIVES[settings.name].distils else RowGroup(0, 1)
