import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.core.schedules import sampling_grid
from shortcut_jax.core.straightness import CONSISTENCY_STEPS, PATH_STEPS, measure_path

NOISE = jax.random.normal(jax.random.key(0), (3, 4, 5))
TIMES = sampling_grid(PATH_STEPS, PATH_STEPS)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_constant_field_is_straight(shift):
    measured = measure_path(lambda x, t, d: 0.0 * x + 2.0, NOISE, sampling_grid(PATH_STEPS, PATH_STEPS, shift))
    assert measured.change_K.shape == (PATH_STEPS - 1,)
    np.testing.assert_allclose(measured.change_K, 0.0, atol=1e-6)
    np.testing.assert_allclose(measured.consistency_L, 0.0, atol=1e-5)


def test_a_linear_field_in_closed_form():
    # v = k x: each step multiplies by 1 - k h; two of half a step of size s by (1 - k s / 2)^2, one by 1 - k s.
    k = 0.5
    measured = measure_path(lambda x, t, d: k * x, NOISE, TIMES)
    np.testing.assert_allclose(measured.change_K, k / PATH_STEPS, rtol=1e-4)
    s = 1.0 / np.array(CONSISTENCY_STEPS)
    expected = (k * s / 2) ** 2 / (1 - (1 - k * s / 2) ** 2)
    np.testing.assert_allclose(measured.consistency_L, expected, rtol=1e-3)


def test_a_field_of_time_alone_changes_where_time_does():
    measured = measure_path(
        lambda x, t, d: jnp.ones_like(x) * jnp.where(t > 0.5, 1.0, 3.0)[:, None, None], NOISE, TIMES
    )
    expected = np.zeros(PATH_STEPS - 1)
    expected[PATH_STEPS // 2 - 1] = 2.0
    np.testing.assert_allclose(measured.change_K, expected, atol=1e-5)
    # One step goes 1, two go (1 + 3) / 2 = 2: half of the length of the two; smaller steps lie on one side.
    np.testing.assert_allclose(measured.consistency_L, [0.5, 0, 0, 0, 0], atol=1e-5)


def test_steps_that_are_compared_tell_their_size_and_the_path_tells_none():
    # A field that is right for any step it is told (v = k x averaged over the step) is consistent at all sizes.
    k = 1.0
    exact = lambda x, t, d: x * jnp.where(d > 0, (1 - jnp.exp(-k * d)) / jnp.maximum(d, 1e-9), k)[:, None, None]
    measured = measure_path(exact, NOISE, TIMES)
    np.testing.assert_allclose(measured.consistency_L, 0.0, atol=1e-5)
    np.testing.assert_allclose(measured.change_K, k / PATH_STEPS, rtol=1e-4)
