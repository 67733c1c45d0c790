import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.core.flow import euler, heun, interpolate, per_row, predictions, velocity_target
from shortcut_jax.core.schedules import sampling_grid


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal((3, 4, 2)).astype(np.float32) for _ in range(2))


def test_one_scalar_a_row_scales_its_own_row_only():
    scaled = per_row(jnp.array([1.0, 10.0, 100.0]), jnp.ones((3, 3, 3))) * jnp.ones((3, 3, 3))
    np.testing.assert_array_equal(scaled.mean(axis=(1, 2)), [1.0, 10.0, 100.0])


def test_time_zero_is_data_and_time_one_is_noise(pair):
    x0, noise = pair
    x = interpolate(x0, noise, jnp.array([0.0, 1.0, 0.25]))
    np.testing.assert_array_equal(x[0], x0[0])
    np.testing.assert_array_equal(x[1], noise[1])
    np.testing.assert_allclose(x[2], 0.75 * x0[2] + 0.25 * noise[2], rtol=1e-6)


def test_velocity_target_is_the_time_derivative_of_the_path(pair):
    x0, noise = pair
    t_B = jnp.array([0.1, 0.5, 0.9])
    _, derivative = jax.jvp(lambda t: interpolate(x0, noise, t), (t_B,), (jnp.ones(3),))
    np.testing.assert_allclose(velocity_target(x0, noise), derivative, rtol=1e-6)


@pytest.mark.parametrize(("num_steps", "shift"), [(1, 1.0), (3, 2.5), (8, 4.0)])
def test_sampling_along_the_true_velocity_turns_noise_into_data(pair, num_steps, shift):
    x0, noise = pair
    times = sampling_grid(num_steps, 8, shift)
    data = euler(lambda x, t, d: velocity_target(x0, noise), noise, times, num_steps, None)
    np.testing.assert_allclose(data, x0, atol=1e-5)


def test_steps_are_those_of_the_grid_taken_in_order():
    times = jnp.array([1.0, 0.7, 0.2, 0.0])
    x = euler(lambda x, t, d: 2.0 * x, jnp.ones((2, 3, 1)), times, 3, None)
    np.testing.assert_allclose(x, np.full((2, 3, 1), (1 - 0.6) * (1 - 1.0) * (1 - 0.4)), atol=1e-6)
    x = euler(lambda x, t, d: 0.5 * x, jnp.ones((2, 3, 1)), times, 3, None)
    np.testing.assert_allclose(x, np.full((2, 3, 1), 0.85 * 0.75 * 0.9), rtol=1e-6)


def test_the_velocity_is_taken_at_the_start_of_each_step():
    times = jnp.array([1.0, 0.6, 0.1])
    x = euler(lambda x, t, d: t[:, None, None] * jnp.ones_like(x), jnp.zeros((2, 1, 1)), times, 2, None)
    np.testing.assert_allclose(x, np.full((2, 1, 1), -(0.4 * 1.0 + 0.5 * 0.6)), rtol=1e-6)


def test_one_program_serves_every_step_count_and_ignores_later_times():
    times = jnp.array([1.0, 0.5, 0.25, jnp.nan])
    traced = []

    @jax.jit
    def sample(num_steps):
        traced.append(num_steps)
        return euler(lambda x, t, d: jnp.ones_like(x), jnp.zeros((1, 1, 1)), times, num_steps, None)

    assert [float(sample(n)[0, 0, 0]) for n in (0, 1, 2)] == [0.0, -0.5, -0.75]
    assert np.isnan(sample(3)).all()
    assert len(traced) == 1


def test_the_model_is_told_the_step_sizes_it_is_given():
    times, told = jnp.array([1.0, 0.5, 0.0]), jnp.array([0.25, 3.0])
    x = euler(lambda x, t, d: d[:, None, None] * jnp.ones_like(x), jnp.zeros((2, 1, 1)), times, 2, told)
    np.testing.assert_allclose(x, np.full((2, 1, 1), -0.5 * (0.25 + 3.0)))
    seen = []
    euler(lambda x, t, d: seen.append(d) or x, jnp.zeros((2, 1, 1)), times, 2, None)
    assert set(seen) == {None}


def _error(integrator, num_steps):
    """Of x' = -x run from t = 1 to 0, where x(0) = e x(1)."""
    times = sampling_grid(num_steps, 64)
    x = integrator(lambda x, t, d: -x, jnp.ones((1, 1, 1)), times, num_steps, None)
    return abs(float(x[0, 0, 0]) - np.e)


def test_heun_is_of_second_order_and_euler_of_first():
    for n in (4, 8, 16):
        assert 1.7 < _error(euler, n) / _error(euler, 2 * n) < 2.1
        assert 3.5 < _error(heun, n) / _error(heun, 2 * n) < 4.2
    assert _error(heun, 1) == _error(euler, 1)


@pytest.mark.parametrize("integrator", [euler, heun])
def test_a_constant_field_is_followed_exactly(integrator):
    times = jnp.array([1.0, 0.75, 0.5, 0.0])
    x = integrator(lambda x, t, d: jnp.full_like(x, 3.0), jnp.ones((2, 1, 1)), times, 3, None)
    np.testing.assert_array_equal(x, np.full((2, 1, 1), -2.0))


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_heun_is_that_of_diffusers(num_steps):
    import torch
    from diffusers import FlowMatchHeunDiscreteScheduler

    scheduler = FlowMatchHeunDiscreteScheduler(shift=1.7)
    scheduler.set_timesteps(num_steps)
    field = lambda x, t: (1.0 + t) * x - 2.0 * t**2
    x = torch.full((1, 2, 1), 0.3)
    for t in scheduler.timesteps:
        x = scheduler.step(field(x, t / 1000), t, x).prev_sample
    first = np.unique(scheduler.sigmas.numpy())[::-1].copy()
    times = jnp.concatenate([jnp.asarray(first), jnp.full(3, jnp.nan)])
    ours = heun(lambda x, t, d: field(x, t[:, None, None]), jnp.full((1, 2, 1), 0.3), times, num_steps, None)
    np.testing.assert_allclose(ours, x.numpy(), atol=2e-5)  # it divides by small sigmas


def test_heun_evaluates_twice_a_step_but_for_the_last():
    seen = []
    velocity = lambda x, t, d: jax.debug.callback(lambda t: seen.append(float(t)), t[0], ordered=True) or x
    heun(velocity, jnp.ones((1, 1, 1)), jnp.array([1.0, 0.5, 0.25, 0.0]), 3, None).block_until_ready()
    jax.effects_barrier()
    assert seen == [1.0, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_predictions_are_what_each_step_aims_at_and_then_the_result(pair, method):
    x0, noise = pair
    times = sampling_grid(3, 5, 2.0)
    aimed = predictions(lambda x, t, d: velocity_target(x0, noise), noise, times, 3, None, method)
    np.testing.assert_allclose(aimed[:4], np.stack([x0] * 4), atol=1e-5)
    assert not aimed[4:].any() and len(aimed) == 6
    curved = lambda x, t, d: t[:, None, None] * x
    aimed = predictions(curved, noise, times, 3, None, method)
    result = {"euler": euler, "heun": heun}[method](curved, noise, times, 3, None)
    np.testing.assert_allclose(aimed[3], result, rtol=1e-6)
    np.testing.assert_allclose(aimed[0], 0.0, atol=1e-6)  # x - 1 x
