import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.core.schedules import ShiftRange, StudentSteps, draw_intervals, interval_times
from shortcut_jax.core.shortcut import (
    adaptive_weight,
    alpha_target,
    jump_target,
    meanflow_target,
    scfm_target,
    shortcut_target,
    squared_error,
)

ROWS = 6


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(0), (ROWS, 5, 3))


def _times(jumps):
    count, start = jnp.array([1, 2, 2, 3, 8, 8]), jnp.array([0, 0, 1, 1, 0, 7])
    return interval_times(count, start, jnp.linspace(1.0, 4.0, ROWS), jumps)


def _column(scalar_B):
    return np.asarray(scalar_B)[:, None, None]


@pytest.mark.parametrize(
    ("jumps", "shift", "counts"),
    [(2, 1.0, (1,)), (2, 3.5, (1, 2, 4)), (4, 1.0, (3, 16)), (4, 3.5, (1, 2, 4))],
)
def test_a_constant_field_is_its_own_target(x, jumps, shift, counts):
    steps = StudentSteps(counts, jumps=jumps)
    times, count = draw_intervals(jax.random.key(1), ROWS, steps, ShiftRange(shift, shift), 64)
    constant = jax.random.normal(jax.random.key(2), x.shape)
    velocity = lambda x, t, d=None: constant
    np.testing.assert_allclose(scfm_target(x, times, velocity, velocity), constant, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(shortcut_target(x, times, count, velocity, steps), constant, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("jumps", [2, 4])
def test_a_field_of_time_alone_gives_the_step_weighted_mean_over_the_interval(x, jumps):
    times = _times(jumps)
    velocity = lambda x, t: jnp.broadcast_to((t**2 + 1.0)[:, None, None], x.shape)
    t, dt = np.asarray(times)[:, :-1], -np.diff(np.asarray(times))
    expected = (dt * (t**2 + 1.0)).sum(axis=1) / dt.sum(axis=1)
    target = scfm_target(x, times, velocity, velocity)
    np.testing.assert_allclose(target, np.broadcast_to(_column(expected), x.shape), rtol=1e-5)


def test_a_linear_field_gives_the_closed_form_of_two_jumps(x):
    times, k = _times(2), 1.7
    target = scfm_target(x, times, lambda x, t: k * x, lambda x, t: k * x)
    dt1, dt2 = _column(times[:, 0] - times[:, 1]), _column(times[:, 1] - times[:, 2])
    expected = (dt1 * k * x + dt2 * k * (1 - dt1 * k) * x) / (dt1 + dt2)
    np.testing.assert_allclose(target, expected, rtol=1e-5, atol=1e-6)


def test_the_target_leads_where_the_smaller_steps_lead(x):
    times = _times(4)
    factors = (0.3, -0.8, 1.1, 2.0)
    target = jump_target(x, times, [lambda x, t, k=k: k * x for k in factors])
    dt = -np.diff(np.asarray(times))
    end = x * _column(np.prod(1.0 - dt * np.array(factors), axis=1))
    np.testing.assert_allclose(x - _column(times[:, 0] - times[:, -1]) * target, end, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("jumps", [2, 4, 6])
def test_the_first_half_of_the_jumps_is_the_first_velocitys_and_the_rest_the_slow_ones(x, jumps):
    times, calls = _times(jumps), []
    record = lambda name: lambda x, t: calls.append((name, t)) or x
    scfm_target(x, times, record("first"), record("slow"))
    assert [name for name, _ in calls] == ["first"] * (jumps // 2) + ["slow"] * (jumps // 2)
    np.testing.assert_array_equal(jnp.stack([t for _, t in calls], axis=1), times[:, :-1])


def test_swapping_first_and_slow_changes_the_target(x):
    times = _times(2)
    one, other = lambda x, t: 0.5 * x, lambda x, t: 2.0 * x + 1.0
    target, swapped = scfm_target(x, times, one, other), scfm_target(x, times, other, one)
    assert np.abs(np.asarray(target - swapped)).max(axis=(1, 2)).min() > 0.01


def test_no_gradient_reaches_the_networks_that_make_the_target(x):
    times = _times(2)
    params = {"first": jnp.array(0.5), "slow": jnp.array(0.7), "student": jnp.array(0.9)}
    field = lambda k: lambda x, t, d=None: k * x

    def loss(params, x):
        target = scfm_target(x, times, field(params["first"]), field(params["slow"]))
        return jnp.sum(squared_error(params["student"] * x, target))

    grads = jax.grad(loss)(params, x)
    assert float(grads["first"]) == 0.0 and float(grads["slow"]) == 0.0
    assert float(grads["student"]) != 0.0
    through_state = jax.grad(lambda x: jnp.sum(scfm_target(x, times, field(0.5), field(0.7))))(x)
    assert not np.any(through_state)


def test_no_gradient_reaches_the_network_that_makes_a_shortcut_target(x):
    steps = StudentSteps((1, 2))
    loss = lambda k: jnp.sum(shortcut_target(x, _times(2), jnp.full(ROWS, 1), lambda x, t, d: k * x, steps))
    assert float(jax.grad(loss)(0.5)) == 0.0


@pytest.mark.parametrize("jumps", [2, 4])
def test_a_shortcut_target_tells_each_jump_its_size_where_it_is_taught_and_zero_elsewhere(x, jumps):
    counts = jnp.array([1, 2, 2, 3, 8, 8])
    steps = StudentSteps((1, 2, 3, 8, 2 * jumps), jumps=jumps)
    taught = np.isin(np.asarray(counts) * jumps, steps.counts)
    assert taught.any() and not taught.all()
    times, told = _times(jumps), []
    shortcut_target(x, times, counts, lambda x, t, d: told.append((t, d)) or x, steps)
    t_BJ, d_BJ = (np.stack([np.asarray(call[i]) for call in told], axis=1) for i in range(2))
    np.testing.assert_array_equal(t_BJ, times[:, :-1])
    np.testing.assert_array_equal(d_BJ, np.where(taught[:, None], -np.diff(np.asarray(times)), 0.0))


def test_a_told_step_size_reaches_the_target(x):
    times, steps = _times(2), StudentSteps((1, 2))
    velocity = lambda x, t, d: jnp.broadcast_to(d[:, None, None], x.shape)
    dt = -np.diff(np.asarray(times))
    target = shortcut_target(x, times, jnp.full(ROWS, 1), velocity, steps)
    expected = (dt**2).sum(axis=1) / dt.sum(axis=1)
    np.testing.assert_allclose(target, np.broadcast_to(_column(expected), x.shape), rtol=1e-5)
    assert not np.any(shortcut_target(x, times, jnp.full(ROWS, 2), velocity, steps))


def test_a_target_from_bfloat16_velocities_is_float32():
    x = jnp.ones((ROWS, 5, 3))
    velocity = lambda x, t: (x / 3).astype(jnp.bfloat16)
    target = scfm_target(x, _times(2), velocity, velocity)
    assert target.dtype == jnp.float32
    assert np.any(target != target.astype(jnp.bfloat16).astype(jnp.float32))


def test_squared_error_is_the_mean_of_each_row():
    prediction = jnp.zeros((3, 2, 2)).at[1].set(2.0).at[2, 0, 0].set(4.0)
    np.testing.assert_array_equal(squared_error(prediction, jnp.zeros_like(prediction)), [0.0, 4.0, 4.0])
    np.testing.assert_array_equal(squared_error(jnp.zeros_like(prediction), prediction), [0.0, 4.0, 4.0])


def test_squared_error_of_bfloat16_is_computed_in_float32():
    prediction, target = jnp.full((2, 64, 4), 3.0, jnp.bfloat16), jnp.full((2, 64, 4), 1 / 3, jnp.bfloat16)
    error = squared_error(prediction, target)
    assert error.dtype == jnp.float32
    np.testing.assert_allclose(error, (3.0 - np.float32(target[0, 0, 0])) ** 2, rtol=1e-5)


RATE = 1.3
SPANS = jnp.array([0.9, 0.5, 0.25, 0.1, 1e-3, 0.0])


def _average(x, t, d):
    """The average velocity of dx/dt = RATE x over [t - d, t], whose path is known: x (1 - exp(-RATE d)) / d."""
    safe = jnp.where(d == 0.0, 1.0, d)
    return x * jnp.where(d == 0.0, RATE, -jnp.expm1(-RATE * safe) / safe)[:, None, None]


def test_the_average_velocity_of_a_linear_field_is_its_own_meanflow_target(x):
    t, inner = jnp.linspace(0.95, 1.0, ROWS), slice(0, -1)
    target = meanflow_target(x, t, SPANS, RATE * x, _average)
    np.testing.assert_allclose(target[inner], _average(x, t, SPANS)[inner], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(target[-1], RATE * x[-1])  # no interval: flow matching


def test_the_derivative_of_meanflow_is_that_of_finite_differences(x):
    t, d, v = jnp.linspace(0.6, 0.9, ROWS), jnp.linspace(0.1, 0.5, ROWS), jnp.cos(x)
    average = lambda x, t, d: jnp.sin(x * t[:, None, None]) + jnp.exp(d)[:, None, None] * x**2
    h = 1e-3
    ahead, behind = (average(x + s * h * v, t + s * h, d + s * h) for s in (1, -1))
    expected = v - _column(d) * (ahead - behind) / (2 * h)
    np.testing.assert_allclose(meanflow_target(x, t, d, v, average), expected, rtol=2e-3, atol=2e-3)


def test_alpha_one_is_flow_matching(x):
    t, v = jnp.linspace(0.9, 1.0, ROWS), jnp.cos(x)
    np.testing.assert_array_equal(alpha_target(x, t, SPANS, v, _average, jnp.ones(ROWS)), v)


def test_alpha_one_half_with_the_network_in_place_of_the_velocity_is_a_shortcut_model(x):
    times = jnp.stack([jnp.full(ROWS, 0.9), 0.9 - SPANS / 2, 0.9 - SPANS], axis=1)[:-1]
    x, t, d = x[:-1], times[:, 0], times[:, 0] - times[:, 2]
    average = lambda x, t, d: jnp.sin(x) * t[:, None, None] + d[:, None, None]
    steps = StudentSteps((1, 2))
    expected = shortcut_target(x, times, jnp.ones(len(x), jnp.int32), average, steps)
    target = alpha_target(x, t, d, average(x, t, d / 2), average, jnp.full(len(x), 0.5))
    np.testing.assert_allclose(target, expected, rtol=1e-4, atol=1e-5)


def test_alpha_towards_zero_approaches_meanflow(x):
    t, v = jnp.linspace(0.9, 1.0, ROWS), jnp.cos(x)
    average = lambda x, t, d: jnp.sin(x) * t[:, None, None] + d[:, None, None] * x
    u = average(x, t, SPANS)
    wanted = meanflow_target(x, t, SPANS, v, average) - u
    gap = lambda a: np.abs((alpha_target(x, t, SPANS, v, average, jnp.full(ROWS, a)) - u) / a - wanted).max()
    assert gap(1e-3) < 1e-2 and gap(1e-1) > 10 * gap(1e-3)


def test_no_gradient_reaches_the_average_velocity_of_a_target(x):
    t, ones = jnp.linspace(0.9, 1.0, ROWS), jnp.ones(ROWS)
    scaled = lambda k: lambda x, t, d: k * _average(x, t, d)
    for target in (
        lambda k: alpha_target(x, t, SPANS, k * x, scaled(k), 0.5 * ones),
        lambda k: meanflow_target(x, t, SPANS, k * x, scaled(k)),
    ):
        assert float(jax.grad(lambda k, target=target: jnp.sum(target(k)))(0.7)) == 0.0


def test_the_adaptive_weight_undoes_the_size_of_an_error_and_passes_no_gradient():
    error = jnp.array([0.0, 0.5, 200.0])
    np.testing.assert_allclose(adaptive_weight(error, 4, 0.5), (4 * error + 1e-3) ** -0.5, rtol=1e-6)
    np.testing.assert_array_equal(adaptive_weight(error, 4, 0.0), 1.0)
    slope = jax.grad(lambda scale: jnp.sum(adaptive_weight(scale * error[1:], 4, 1.0) * scale * error[1:]))(1.0)
    np.testing.assert_allclose(slope, 2 / 4, rtol=1e-3)  # each row's error over itself, and over its values
