import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.core.types import Condition
from shortcut_jax.steps import sampling
from shortcut_jax.steps.sampling import draw_noise, make_sampler
from tests.helpers import tiny_assembly


@pytest.fixture
def fake(monkeypatch):
    """Samplers whose velocity is a function of (condition, x, t, d), the parameters unused."""

    def install(velocity):
        made = lambda cfg, height, width: lambda params, condition: lambda x, t, d: velocity(condition, x, t, d)
        monkeypatch.setattr(sampling, "make_velocity", made)

    return install


CONDITION = Condition(jnp.zeros((2, 1, 1)), jnp.ones((2, 1)))
NOISE = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4)), jnp.float32)


def _sample(cfg, num_steps, **kwargs):
    sampler = jax.jit(make_sampler(cfg, (4, 4), 8, **kwargs))
    return np.asarray(sampler(None, NOISE, CONDITION, num_steps)).sum(-1).sum()


def test_a_constant_field_is_integrated_exactly_at_any_step_count(fake):
    cfg = tiny_assembly().model
    fake(lambda condition, x, t, d: jnp.full_like(x, 3.0))
    expected = float(NOISE.sum()) - 3.0 * NOISE.size
    for n in (1, 2, 3, 8):
        assert np.isclose(_sample(cfg, n, shift=2.5), expected, rtol=1e-5)


def test_euler_on_a_linear_field_has_its_closed_form(fake):
    cfg = tiny_assembly().model
    fake(lambda condition, x, t, d: 0.5 * x)
    for n in (1, 2, 4):
        assert np.isclose(_sample(cfg, n), float(NOISE.sum()) * (1 - 0.5 / n) ** n, rtol=1e-5)


def test_step_sizes_are_told_up_to_the_finest_trained_grid_and_zero_beyond(fake):
    cfg = dataclasses.replace(tiny_assembly().model, step_size=True)
    fake(lambda condition, x, t, d: jnp.broadcast_to(d[:, None, None], x.shape))
    total = lambda n: (float(NOISE.sum()) - _sample(cfg, n, finest=4)) / NOISE.size
    assert np.isclose(total(2), 0.5, rtol=1e-4)
    assert np.isclose(total(4), 0.25, rtol=1e-4)
    assert np.isclose(total(8), 0.0, atol=1e-6)


def test_classifier_free_guidance_extrapolates_from_the_unconditional_velocity(fake):
    cfg = tiny_assembly().model
    fake(lambda condition, x, t, d: jnp.broadcast_to(condition.vec_BV[:, :1, None], x.shape))
    sampler = jax.jit(make_sampler(cfg, (4, 4), 8))
    unconditional = CONDITION._replace(vec_BV=jnp.full((2, 1), 0.25))
    out = sampler(None, NOISE, CONDITION, 2, unconditional, 3.0)
    assert np.isclose(float(out.sum()), float(NOISE.sum()) - (0.25 + 3.0 * 0.75) * NOISE.size, rtol=1e-4)


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    cfg = tiny_assembly().model
    whole = draw_noise(7, 0, 6, cfg, 8, 8)
    np.testing.assert_array_equal(whole[4:], draw_noise(7, 4, 2, cfg, 8, 8))
    assert not np.array_equal(whole, draw_noise(8, 0, 6, cfg, 8, 8))
    assert abs(float(whole.std()) - 1.0) < 0.1


@pytest.mark.slow
def test_guidance_reaches_the_embedding_of_a_model_that_has_one():
    from shortcut_jax.models.init import init_params

    cfg = dataclasses.replace(tiny_assembly().model, guidance=True)
    params = jax.tree.map(lambda x: x + 0.05, init_params(cfg, jax.random.key(0)))
    sampler = jax.jit(make_sampler(cfg, (4, 4), 2))
    noise = jnp.ones((1, 4, cfg.channels))
    outs = []
    for scale in (1.0, 4.0):
        condition = Condition(jnp.ones((1, 3, cfg.text_width)), jnp.ones((1, cfg.pooled_width)), jnp.full((1,), scale))
        outs.append(sampler(params, noise, condition, 1))
    assert not np.allclose(*outs, rtol=1e-3)
