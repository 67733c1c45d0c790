import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shortcut_jax.steps.optim import OptimizerSettings, make_optimizer, make_schedule

PARAMS = {
    "block": {"kernel": jnp.full((3, 2), 2.0), "bias": jnp.full((2,), 2.0)},
    "norm": {"scale": jnp.full((4,), 2.0)},
}


def _grads(value):
    return jax.tree.map(lambda p: jnp.full_like(p, value), PARAMS)


def _first_moment(settings, grads):
    optimizer = make_optimizer(settings, 10)
    _, state = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    return optax.tree_utils.tree_get(state, "mu")


@pytest.mark.parametrize(("clip", "value", "scale"), [(1.0, 5.0, 1 / 15), (60.0, 5.0, 1.0), (0.0, 1e6, 1.0)])
def test_gradients_are_scaled_to_the_clip_norm_where_they_exceed_it(clip, value, scale):
    # Nine entries of one value, the others zero: a norm of three times the value.
    grads = _grads(value)
    grads["norm"]["scale"] = jnp.array([value, 0.0, 0.0, 0.0])
    moment = _first_moment(OptimizerSettings(b1=0.75, clip_norm=clip), grads)
    for actual, gradient in zip(jax.tree.leaves(moment), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(actual, 0.25 * scale * gradient, rtol=1e-5)


def test_weights_decay_where_their_path_says_so_and_nowhere_else():
    settings = OptimizerSettings(learning_rate=0.5, weight_decay=0.1)
    optimizer = make_optimizer(settings, 10)
    updates, _ = optimizer.update(_grads(0.0), optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["block"]["kernel"], -0.5 * 0.1 * 2.0, rtol=1e-6)
    assert not np.any(updates["block"]["bias"]) and not np.any(updates["norm"]["scale"])
    other = make_optimizer(OptimizerSettings(learning_rate=0.5, decay_paths="norm/.*"), 10)
    updates, _ = other.update(_grads(0.0), other.init(PARAMS), PARAMS)
    assert not np.any(updates["block"]["kernel"]) and np.all(updates["norm"]["scale"])


def test_the_first_step_has_the_size_of_the_learning_rate():
    optimizer = make_optimizer(OptimizerSettings(learning_rate=0.25, weight_decay=0.0), 10)
    updates, _ = optimizer.update(_grads(-3.0), optimizer.init(PARAMS), PARAMS)
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(update, 0.25, rtol=1e-5)


def test_warm_up_is_linear_from_zero_and_a_constant_rate_stays():
    schedule = make_schedule(OptimizerSettings(learning_rate=2.0, warmup_steps=4), 100)
    np.testing.assert_allclose([schedule(k) for k in (0, 1, 2, 3, 4, 50, 99)], [0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    assert float(make_schedule(OptimizerSettings(learning_rate=2.0), 100)(0)) == 2.0


def test_a_cosine_falls_to_zero_at_the_last_step_after_the_warm_up():
    settings = OptimizerSettings(learning_rate=2.0, warmup_steps=4, schedule="cosine")
    schedule = make_schedule(settings, 20)
    k = np.arange(4, 21)
    expected = 1.0 + np.cos(np.pi * (k - 4) / 16)
    np.testing.assert_allclose([schedule(i) for i in k], expected, atol=1e-6)
    assert float(schedule(2)) == 1.0 and float(schedule(12)) == pytest.approx(1.0)
