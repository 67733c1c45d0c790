import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.core.schedules import (
    FIRST_TIME,
    ShiftRange,
    Spacing,
    StudentSteps,
    draw_intervals,
    draw_shifts,
    draw_timesteps,
    interval_times,
    resolution_shift,
    sampling_grid,
    shift_time,
    teacher_steps,
    weights_for_share,
)

ROWS = 20_000


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shifting_keeps_the_ends_and_the_order(shift):
    t = np.linspace(0.0, 1.0, 33)
    shifted = shift_time(t, shift)
    assert shifted[0] == 0.0 and shifted[-1] == 1.0
    assert (np.diff(shifted) > 0).all()
    assert np.sign(shifted[16] - 0.5) == np.sign(shift - 1.0)


def test_shifting_multiplies_the_odds_and_its_inverse_is_the_reciprocal_shift():
    t = np.linspace(0.0, 0.99, 12)
    shifted = shift_time(t, 2.5)
    np.testing.assert_allclose(shifted / (1 - shifted), 2.5 * t / (1 - t))
    np.testing.assert_allclose(shift_time(shifted, 1 / 2.5), t, atol=1e-12)


def test_resolution_shift_is_log_linear_through_the_two_published_points():
    assert math.isclose(resolution_shift(256), math.exp(0.5))
    assert math.isclose(resolution_shift(4096), math.exp(1.15))
    assert math.isclose(resolution_shift(1024) ** 5, resolution_shift(256) ** 4 * resolution_shift(4096))


@pytest.mark.parametrize(("num_steps", "shift"), [(1, 1.0), (5, 3.0), (8, 0.5)])
def test_sampling_grid_falls_from_one_to_zero_and_is_padded_with_zeros(num_steps, shift):
    grid = np.asarray(sampling_grid(num_steps, 8, shift))
    assert grid.shape == (9,)
    assert grid[0] == 1.0 and (grid[num_steps:] == 0.0).all()
    assert (np.diff(grid[: num_steps + 1]) < 0).all()
    uniform = shift_time(grid[: num_steps + 1], 1 / shift)
    np.testing.assert_allclose(uniform, np.linspace(1.0, 0.0, num_steps + 1), atol=1e-6)


def test_sampling_grid_takes_a_traced_step_count():
    traced = jax.jit(lambda n: sampling_grid(n, 8, 3.0))
    for num_steps in (1, 3, 7):
        np.testing.assert_allclose(traced(num_steps), sampling_grid(num_steps, 8, 3.0), atol=1e-7)


@pytest.mark.parametrize("spacing", [{}, {"kind": "karras"}, {"kind": "exponential"}, {"terminal": 0.1}])
def test_more_than_one_step_may_begin_at_an_earlier_time_than_one(spacing):
    for num_steps in (1, 2, 7):
        plain = np.asarray(sampling_grid(num_steps, 8, 1.5, Spacing(**spacing)))
        grid = np.asarray(sampling_grid(num_steps, 8, 1.5, Spacing(**spacing, start=0.98)))
        np.testing.assert_allclose(
            [plain[0], grid[0]], [1.0, {1: 1.0, 2: 0.99, 7: 1 - 0.02 * 6 / 7}[num_steps]], rtol=1e-6
        )
        np.testing.assert_array_equal(grid[1:], plain[1:])


def test_uniform_timesteps_fill_the_open_unit_interval():
    t = np.asarray(draw_timesteps(jax.random.key(0), ROWS, "uniform"))
    assert t.shape == (ROWS,) and 0.0 < t.min() < 0.001 and 0.999 < t.max() < 1.0
    assert abs(t.mean() - 0.5) < 0.01 and abs(t.var() - 1 / 12) < 0.002


def test_logit_normal_timesteps_have_standard_normal_logits():
    t = np.asarray(draw_timesteps(jax.random.key(1), ROWS, "logit_normal"), np.float64)
    assert t.shape == (ROWS,) and t.min() > 0.0 and t.max() < 1.0
    logits = np.log(t / (1 - t))
    assert abs(logits.mean()) < 0.03 and abs(logits.var() - 1.0) < 0.04


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_a_range_cuts_the_distribution_of_timesteps(kind):
    """Within the range, the times are distributed as all times that fall into it."""
    t = np.asarray(draw_timesteps(jax.random.key(2), ROWS, kind, 0.1, 0.7))
    assert 0.1 <= t.min() < 0.12 and 0.68 < t.max() <= 0.7
    every = np.asarray(draw_timesteps(jax.random.key(3), 4 * ROWS, kind))
    kept = every[(every > 0.1) & (every < 0.7)]
    np.testing.assert_allclose(np.quantile(t, (0.25, 0.5, 0.75)), np.quantile(kept, (0.25, 0.5, 0.75)), atol=0.015)


def test_the_whole_range_draws_what_no_range_does():
    for kind in ("uniform", "logit_normal"):
        whole, none = (draw_timesteps(jax.random.key(4), 8, kind, *bounds) for bounds in ((0.0, 1.0), ()))
        np.testing.assert_array_equal(whole, none)


def test_unknown_timestep_kind_raises():
    with pytest.raises(ValueError, match=r"'cosine'.*uniform"):
        draw_timesteps(jax.random.key(0), 2, "cosine")


def test_shifts_are_uniform_in_their_range_but_for_the_dynamic_share():
    shifts = np.asarray(draw_shifts(jax.random.key(2), ROWS, ShiftRange(2.5, 4.5, 0.25), 256))
    dynamic = np.isclose(shifts, math.exp(0.5))
    assert abs(dynamic.mean() - 0.25) < 0.015
    rest = shifts[~dynamic]
    assert rest.min() >= 2.5 and rest.max() <= 4.5
    assert abs(rest.mean() - 3.5) < 0.03 and abs(rest.var() - 4 / 12) < 0.01


@pytest.mark.parametrize(("dynamic", "expected"), [(0.0, 3.0), (1.0, math.exp(1.15))])
def test_a_certain_shift_is_every_rows_shift(dynamic, expected):
    shifts = draw_shifts(jax.random.key(2), 64, ShiftRange(3.0, 3.0, dynamic), 4096)
    np.testing.assert_allclose(shifts, expected, rtol=1e-6)


def test_interval_times_of_a_grid_small_enough_to_write_down():
    times = interval_times(jnp.array([2, 2, 1]), jnp.array([0, 1, 0]), jnp.array([1.0, 1.0, 3.0]), 2)
    expected = [[FIRST_TIME, 0.75, 0.5], [0.5, 0.25, 0.0], [FIRST_TIME, 0.75, 0.0]]
    np.testing.assert_allclose(times, expected, atol=1e-7)
    times = interval_times(jnp.array([2, 2, 1]), jnp.array([0, 1, 0]), jnp.array([1.0, 1.0, 3.0]), 2, start=0.98)
    np.testing.assert_allclose(times, [[0.99, 0.75, 0.5], *expected[1:]], atol=1e-7)


@pytest.mark.parametrize("jumps", [2, 4])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_intervals_are_student_steps_of_the_shifted_uniform_grid(jumps, shift):
    steps = StudentSteps((1, 2, 3, 8), jumps=jumps)
    times, count = draw_intervals(jax.random.key(3), 4096, steps, ShiftRange(shift, shift), 64)
    times, count = np.asarray(times, np.float64), np.asarray(count)
    assert times.shape == (4096, jumps + 1)
    assert (np.diff(times) < 0).all()
    index = (1.0 - shift_time(times, 1 / shift)) * (count * jumps)[:, None]
    np.testing.assert_allclose(index, np.round(index), atol=2e-3)
    index = np.round(index).astype(int)
    assert (np.diff(index) == 1).all()
    assert (index[:, 0] % jumps == 0).all()
    assert index.min() == 0 and (index[:, -1] <= count * jumps).all()
    first = index[:, 0] == 0
    assert first.any() and (times[first, 0] == np.float32(1.0 - 1e-5)).all()
    assert times.max() == np.float32(1.0 - 1e-5)
    last = index[:, -1] == count * jumps
    assert last.any() and (times[last, -1] == 0.0).all()


@pytest.mark.parametrize("jumps", [2, 4])
def test_teacher_intervals_are_jumps_of_the_teachers_grid_that_start_at_a_multiple_of_them(jumps):
    steps = teacher_steps(32, jumps)
    times, count = draw_intervals(jax.random.key(3), 4096, steps, ShiftRange(), 64)
    index = np.round((1.0 - np.asarray(times)) * 32).astype(int)
    np.testing.assert_allclose(times, np.minimum(1.0 - index / 32, FIRST_TIME), atol=1e-6)
    assert (np.diff(index) == 1).all() and set(np.asarray(count)) == {32 // jumps}
    assert set(index[:, 0]) == set(range(0, 32, jumps))
    for grid in (30, 0):
        with pytest.raises(ValueError, match=f"grid of {grid} steps is not a multiple of 4"):
            teacher_steps(grid, 4)


def test_counts_follow_their_weights_and_starts_are_uniform():
    steps = StudentSteps((1, 3, 8), weights=(1.0, 2.0, 5.0))
    times, count = draw_intervals(jax.random.key(4), ROWS, steps, ShiftRange(), 64)
    count = np.asarray(count)
    assert set(count) == {1, 3, 8}
    for m, share in ((1, 1 / 8), (3, 2 / 8), (8, 5 / 8)):
        assert abs((count == m).mean() - share) < 0.015
        starts = np.round((1.0 - np.asarray(times)[count == m, 0]) * m).astype(int)
        frequencies = np.bincount(starts) / len(starts)
        assert len(frequencies) == m
        np.testing.assert_allclose(frequencies, 1 / m, atol=0.03)


def test_counts_without_weights_are_equally_frequent():
    assert StudentSteps((1, 2, 4)).probabilities == pytest.approx((1 / 3,) * 3)
    _, count = draw_intervals(jax.random.key(5), ROWS, StudentSteps((2, 5)), ShiftRange(), 64)
    assert set(np.asarray(count)) == {2, 5}
    assert abs((np.asarray(count) == 2).mean() - 0.5) < 0.02


@pytest.mark.parametrize(
    ("weights", "share"),
    [((1.0, 1.25, 1.7, 1.6, 1.9, 1.8, 2.3, 2.3), 0.29), ((), 0.40), ((7.0,) + (1.0,) * 7, 0.82)],
)
def test_the_share_of_one_step_is_that_of_the_rows_at_pure_noise(weights, share):
    steps = StudentSteps(weights=weights)
    assert steps.one_step_share == pytest.approx(share, abs=0.005)
    intervals = draw_intervals(jax.random.key(7), 16 * ROWS, steps, ShiftRange(), 64)
    count_B = np.asarray(intervals.count_B)[np.asarray(intervals.times_BJ)[:, 0] > 0.999]
    assert (count_B == 1).mean() == pytest.approx(share, abs=0.02)


def test_weights_for_a_share_are_equal_but_for_one_step():
    counts = (2, 1, 8)
    weights = weights_for_share(counts, 0.75)
    assert StudentSteps(counts, weights).one_step_share == pytest.approx(0.75)
    assert weights[0] == weights[2] and sum(weights) == pytest.approx(1.0)
    assert StudentSteps((2, 4)).one_step_share == 0.0
    for wrong, share in (((1,), 0.5), ((2, 4), 0.5), (counts, 0.0), (counts, 1.0)):
        with pytest.raises(ValueError, match="must be"):
            weights_for_share(wrong, share)


def test_shifts_differ_between_rows():
    steps = StudentSteps((1,))
    times, _ = draw_intervals(jax.random.key(6), ROWS, steps, ShiftRange(2.5, 4.5), 64)
    middle = np.asarray(times)[:, 1]
    shifts = middle / (1 - middle)
    assert 2.5 <= shifts.min() < 2.52 and 4.48 < shifts.max() <= 4.5001


def test_untaught_counts_are_those_whose_double_is_absent():
    assert StudentSteps((1, 2, 3, 4, 6)).unsupervised_counts == (4, 6)
    assert StudentSteps((1, 2, 4), jumps=2).unsupervised_counts == (4,)
    assert StudentSteps((1, 3)).unsupervised_counts == (1, 3)


def test_scaled_grids_of_different_counts_share_no_time_and_are_those_of_training():
    spacing, counts = Spacing(start=0.98, scaled=True), (1, 2, 4, 8)
    grids = {n: np.asarray(sampling_grid(n, n, 1.0, spacing))[:-1] for n in counts}
    np.testing.assert_allclose(grids[1], [1.0])
    np.testing.assert_allclose(grids[2], 0.99 * np.array([1.0, 0.5]), rtol=1e-6)
    times = np.concatenate(list(grids.values()))
    assert len(np.unique(times)) == len(times)
    plain = [np.asarray(sampling_grid(n, n, 1.0, Spacing(start=0.98)))[:-1] for n in counts]
    assert len(np.unique(np.concatenate(plain))) < len(times)  # which share 1/2
    for n in counts[1:]:
        count_B, shift_B = jnp.full(n, n), jnp.ones(n)
        trained = interval_times(count_B, jnp.arange(n), shift_B, 4, 0.98, True)
        np.testing.assert_allclose(trained[:, 0], grids[n], rtol=1e-6)
        np.testing.assert_allclose(trained[:-1, -1], grids[n][1:], rtol=1e-6)
