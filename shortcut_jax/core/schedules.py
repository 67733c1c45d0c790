"""Times: shifts, sampling grids, and the random timesteps and intervals of training."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from shortcut_jax.core.setting import PROBABILITY, setting
from shortcut_jax.core.types import Array

FIRST_TIME = 1.0 - 1e-5
"""The first point of every training grid. Published value: pure noise itself carries no information on the data."""


@dataclass(frozen=True)
class ShiftRange:
    """How the timestep shift of a shortcut row is drawn.

    Attributes:
      low: the least shift; it is uniform in [low, high].
      high: the greatest shift.
      dynamic: probability of the resolution-dependent shift instead.
    """

    low: float = 1.0
    high: float = 1.0
    dynamic: float = setting(0.0, PROBABILITY)


@dataclass(frozen=True)
class StudentSteps:
    """The student step counts that self rows train, and how often each is drawn.

    Attributes:
      counts: student step counts m, each at least 1. A row trains one step of the m-step sampler.
      weights: relative frequency of each count; empty means equal.
      jumps: J, the grid steps that make up one student step: an even number.
      start: see `start_of`; with 1 all samplers begin at t = 1.
      scaled: see `earlier`.
    """

    counts: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16)
    weights: tuple[float, ...] = ()
    jumps: int = 2
    start: float = 1.0
    scaled: bool = False

    @property
    def probabilities(self) -> tuple[float, ...]:
        """The weights, normalised to sum to 1, one a count."""
        weights = self.weights or (1.0,) * len(self.counts)
        return tuple(w / sum(weights) for w in weights)

    @property
    def one_step_share(self) -> float:
        """The share of m = 1 among the rows whose student step begins at pure noise: P(1) / sum_m P(m) / m.

        Every count begins there, with a target of its own. A network without a step-size input has one answer for all
        of them, so one step becomes the better the larger this share is.
        """
        starts = {m: p / m for m, p in zip(self.counts, self.probabilities, strict=True)}
        return starts.get(1, 0.0) / sum(starts.values())

    @property
    def unsupervised_counts(self) -> tuple[int, ...]:
        """The counts m whose finer count J m is absent, so that nothing trains the steps their targets are made of."""
        return tuple(m for m in self.counts if self.jumps * m not in self.counts)


@dataclass(frozen=True)
class AlphaSchedule:
    """How alpha-Flow's alpha falls during a run: linearly, then constant.

    Attributes:
      first: alpha at the first step; 1 is flow matching.
      last: the least alpha, which is positive; towards 0 it is MeanFlow.
      until: the share of the run at which it has reached `last`.
    """

    first: float = 1.0
    last: float = 0.1
    until: float = 0.5

    def at(self, progress: Array) -> Array:
        """Alpha where the share `progress` of the run is done."""
        return self.first + (self.last - self.first) * jnp.minimum(progress / self.until, 1.0)


def weights_for_share(counts: tuple[int, ...], share: float) -> tuple[float, ...]:
    """The weights, equal for all counts but 1, with which `StudentSteps.one_step_share` is `share`.

    Raises:
      ValueError: 1 is not one of several counts, or the share is not in (0, 1).
    """
    if 1 not in counts or len(counts) < 2:
        raise ValueError(f"step counts {counts} have no share of 1 to choose: 1 must be one of several")
    if not 0 < share < 1:
        raise ValueError(f"the share of one step is {share:g}, but must be between 0 and 1")
    others = [1 / m for m in counts if m != 1]
    mean = sum(others) / len(others)  # the chance that a row of another count begins at pure noise
    p_one = share * mean / (1 - share + share * mean)
    return tuple(p_one if m == 1 else (1 - p_one) / len(others) for m in counts)


def start_of(count: Array | float, start: float) -> Array | float:
    """The time at which a sampler of `count` steps begins, from pure noise: 1 - (1 - start) (1 - 1 / count).

    It is 1 for one step and goes to `start` for many. All samplers begin with the same state, and each asks for another
    first step; where they begin at different times, a network without a step-size input can tell them apart.
    """
    return 1.0 - (1.0 - start) * (1.0 - 1.0 / count)


def earlier(times: Array, count: Array | float, start: float, scaled: bool) -> Array:
    """The times of a grid of `count` steps that begins at its own start.

    Args:
      times: of the grid from 1.
      count: broadcasts against them.
      start: see `start_of`.
      scaled: whether all times are scaled by the start, so that grids of different counts never share a time (two, four
        and eight steps else meet at 1/2); else the first one alone is earlier.
    """
    first = start_of(count, start)
    return times * first if scaled else jnp.minimum(times, first)


def teacher_steps(grid: int, jumps: int, start: float = 1.0, scaled: bool = False) -> StudentSteps:
    """What teacher rows train: the student steps of `jumps` grid steps on the teacher's own grid of `grid` steps.

    Raises:
      ValueError: the grid is not made of whole student steps.
    """
    if grid % jumps or grid < jumps:
        raise ValueError(f"a teacher grid of {grid} steps is not a multiple of {jumps} jumps")
    return StudentSteps((grid // jumps,), jumps=jumps, start=start, scaled=scaled)


class Intervals(NamedTuple):
    """One interval a row: a student step and the grid points inside it.

    Attributes:
      times_BJ: the J + 1 decreasing grid times, shape [B, J + 1].
      count_B: the student step count m each row was drawn for.
    """

    times_BJ: Array
    count_B: Array


def shift_time(t: Array, shift: Array | float) -> Array:
    """Shifts times towards noise: s t / (1 + (s - 1) t), which keeps 0 and 1 in place."""
    return shift * t / (1.0 + (shift - 1.0) * t)


@dataclass(frozen=True)
class ShiftRule:
    """The timestep shift a model is sampled with, by the number of image tokens; the defaults are FLUX.1's.

    Attributes:
      dynamic: whether the shift is exp(mu), mu on the line through `base_shift` and `max_shift`; else it is `shift`.
      shift: the fixed shift.
      base_shift: mu at `base_tokens`.
      max_shift: mu at `max_tokens`.
      base_tokens: see `base_shift`.
      max_tokens: see `max_shift`.
      linear: whether a dynamic shift is mu itself.

    Raises:
      ValueError: no line goes through the two points, or a shift is not positive.
    """

    dynamic: bool = True
    shift: float = 1.0
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    linear: bool = False

    def __post_init__(self) -> None:
        if self.dynamic and self.base_tokens == self.max_tokens:
            raise ValueError(
                f"the dynamic shift has {self.base_shift:g} and {self.max_shift:g} at one number of image tokens, "
                f"{self.base_tokens}: they must be two"
            )
        if not self.dynamic and not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"the shift is {self.shift:g}, but must be positive and finite")

    def at(self, num_tokens: int) -> float:
        """The shift for `num_tokens` image tokens. Raises ValueError where a dynamic one is not positive and finite."""
        if not self.dynamic:
            return self.shift
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        mu = self.base_shift + slope * (num_tokens - self.base_tokens)
        if abs(mu) > _MOST_MU or (self.linear and mu <= 0):
            raise ValueError(f"the dynamic shift at {num_tokens} image tokens has mu = {mu:g}, which is out of range")
        return mu if self.linear else math.exp(mu)


_MOST_MU = 80.0
"""exp of more leaves the range of float32."""

SPACINGS = ("uniform", "karras", "exponential")


@dataclass(frozen=True)
class Spacing:
    """How the times of a sampling grid lie between its ends, as diffusers' `FlowMatchEulerDiscreteScheduler` has it.

    Attributes:
      kind: `uniform` before the shift, or from the first to the last shifted time: uniform in t^(1/7) (`karras`,
        arXiv 2206.00364, rho = 7) or in log t (`exponential`).
      terminal: the time at which the last step begins, to which the shifted times are stretched; 0 for none.
      start: the time at which a grid of many steps begins; see `start_of`.
      scaled: see `earlier`.

    Raises:
      ValueError: another kind, a terminal time outside [0, 1), or a start outside (terminal, 1].
    """

    kind: str = "uniform"
    terminal: float = 0.0
    start: float = 1.0
    scaled: bool = False

    def __post_init__(self) -> None:
        if self.kind not in SPACINGS:
            raise ValueError(f"the spacing of times is {self.kind!r}, but must be one of {', '.join(SPACINGS)}")
        if not 0 <= self.terminal < 1:
            raise ValueError(f"the terminal time is {self.terminal:g}, but must be at least 0 and below 1")
        if not self.terminal < self.start <= 1:
            raise ValueError(f"sampling starts at {self.start:g}, but must be above {self.terminal:g} and at most 1")


def resolution_shift(num_tokens: int) -> float:
    """Flux's resolution-dependent shift exp(mu): mu is linear, 0.5 at 256 image tokens and 1.15 at 4096."""
    return ShiftRule().at(num_tokens)


def sampling_grid(
    num_steps: Array | int, max_steps: int, shift: Array | float = 1.0, spacing: Spacing | None = None
) -> Array:
    """The shifted grid from 1 to 0 in `num_steps` steps, padded with zeros to shape [max_steps + 1]; uniform before it
    is shifted, unless `spacing` says otherwise."""
    k = jnp.arange(max_steps + 1, dtype=jnp.float32)
    times = shift_time(jnp.clip(1.0 - k / num_steps, 0.0, 1.0), shift)
    if spacing is None or spacing == Spacing():
        return times
    several = jnp.asarray(num_steps) > 1  # the one time of a single step is 1, which nothing stretches
    last = jnp.where(several, shift_time(1.0 / jnp.asarray(num_steps, jnp.float32), shift), 0.0)
    if spacing.terminal:
        times = jnp.where(several, 1.0 - (1.0 - times) * (1.0 - spacing.terminal) / (1.0 - last), times)
        last = jnp.asarray(spacing.terminal)
    ramp = k / jnp.maximum(num_steps - 1, 1)
    if spacing.kind == "karras":
        times = (1.0 + ramp * (last ** (1 / 7) - 1.0)) ** 7
    elif spacing.kind == "exponential":
        times = jnp.where(several, last, 1.0) ** ramp
    return jnp.where(k < num_steps, earlier(times, num_steps, spacing.start, spacing.scaled), 0.0)


def draw_timesteps(key: Array, num_rows: int, kind: str, low: float = 0.0, high: float = 1.0) -> Array:
    """Timesteps of flow rows in (low, high), shape [B].

    Args:
      kind: `uniform`, or `logit_normal` (the sigmoid of a standard normal, as in Stable Diffusion 3).
      low: the least time; the distribution is cut there, not squeezed.
      high: the greatest time.

    Raises:
      ValueError: another kind.
    """
    if kind == "uniform":
        return jax.random.uniform(key, (num_rows,), minval=max(low, 1e-6), maxval=high)
    if kind == "logit_normal":
        if (low, high) == (0.0, 1.0):  # the same times as ever: a truncated normal draws others
            return jax.nn.sigmoid(jax.random.normal(key, (num_rows,)))
        lower, upper = (jax.scipy.special.logit(jnp.float32(t)) for t in (low, high))
        return jax.nn.sigmoid(jax.random.truncated_normal(key, lower, upper, (num_rows,)))
    raise ValueError(f"timestep is {kind!r}, but must be 'uniform' or 'logit_normal'")


def draw_spans(key: Array, num_rows: int, kind: str) -> Intervals:
    """Intervals between two times of `draw_timesteps`, from noise to data; their student step count is 0, for none."""
    times_BJ = draw_timesteps(key, 2 * num_rows, kind).reshape(num_rows, 2)
    times_BJ = jnp.minimum(jnp.sort(times_BJ, axis=1, descending=True), FIRST_TIME)
    return Intervals(times_BJ, jnp.zeros(num_rows, jnp.int32))


def draw_shifts(key: Array, num_rows: int, shift: ShiftRange, num_tokens: int) -> Array:
    """One shift a row, shape [B]; `num_tokens` image tokens set the resolution-dependent one."""
    key_range, key_dynamic = jax.random.split(key)
    shift_B = jax.random.uniform(key_range, (num_rows,), minval=shift.low, maxval=shift.high)
    dynamic_B = jax.random.uniform(key_dynamic, (num_rows,)) < shift.dynamic
    return jnp.where(dynamic_B, resolution_shift(num_tokens), shift_B)


def interval_times(
    count_B: Array, start_B: Array, shift_B: Array, jumps: int, start: float = 1.0, scaled: bool = False
) -> Array:
    """Times of the `jumps` + 1 grid points of student step `start_B` (0-based) out of `count_B`, shape [B, J + 1].

    The grid is the shifted uniform grid of count x jumps steps, `earlier` as the sampler of the count has it; its first
    point is at most `FIRST_TIME`.
    """
    chex.assert_rank([count_B, start_B, shift_B], 1)
    chex.assert_equal_shape([count_B, start_B, shift_B])
    index_BJ = start_B[:, None] * jumps + jnp.arange(jumps + 1)
    uniform_BJ = 1.0 - index_BJ / (count_B * jumps)[:, None]
    times_BJ = earlier(shift_time(uniform_BJ, shift_B[:, None]), count_B[:, None], start, scaled)
    return jnp.minimum(times_BJ, FIRST_TIME)


def draw_intervals(key: Array, num_rows: int, steps: StudentSteps, shift: ShiftRange, num_tokens: int) -> Intervals:
    """Draws for each row a student step count, one of its steps, and a shift (section "What SCFM changes")."""
    key_count, key_start, key_shift = jax.random.split(key, 3)
    counts = jnp.asarray(steps.counts, jnp.int32)
    count_B = counts[
        jax.random.choice(key_count, len(steps.counts), (num_rows,), p=jnp.asarray(steps.probabilities, jnp.float32))
    ]
    start_B = jnp.minimum((jax.random.uniform(key_start, (num_rows,)) * count_B).astype(jnp.int32), count_B - 1)
    shift_B = draw_shifts(key_shift, num_rows, shift, num_tokens)
    return Intervals(interval_times(count_B, start_B, shift_B, steps.jumps, steps.start, steps.scaled), count_B)
