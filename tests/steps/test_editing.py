import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.core.schedules import sampling_grid
from shortcut_jax.core.types import Condition
from shortcut_jax.steps import editing
from shortcut_jax.steps.editing import EditPlan, flow_edit, make_editor, make_plan
from tests.helpers import tiny_assembly

X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 2)), jnp.float32)
TIMES = sampling_grid(4, 6, 1.5)


def _noise(step, draw):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), step), draw)
    return jax.random.normal(key, X.shape)


def _constant(value):
    return lambda x, t, d: jnp.full_like(x, value)


def test_equal_velocities_give_the_image_back_bit_for_bit():
    curved = lambda x, t, d: jnp.sin(7.0 * x) * t[:, None, None]
    for plan in (EditPlan(4), EditPlan(4, skip=1), EditPlan(4, average=3)):
        edited = jax.jit(lambda plan: flow_edit(curved, curved, X, _noise, TIMES, plan))(plan)
        np.testing.assert_array_equal(edited, X)


@pytest.mark.parametrize("plan", [EditPlan(4), EditPlan(4, skip=2), EditPlan(4, skip=1, average=5)])
def test_constant_velocities_move_it_by_their_difference_over_the_time_that_is_left(plan):
    edited = flow_edit(_constant(0.5), _constant(2.0), X, _noise, TIMES, plan)
    np.testing.assert_allclose(edited, X - TIMES[plan.skip] * 1.5, atol=1e-5)


def test_plain_steps_start_from_the_noisy_image_and_follow_the_target_only():
    edited = flow_edit(_constant(0.5), _constant(2.0), X, _noise, TIMES, EditPlan(4, skip=1, plain=2))
    t = TIMES[2]
    noisy = (1 - t) * X + t * _noise(2, 0) - (TIMES[1] - t) * 1.5
    np.testing.assert_allclose(edited, noisy - t * 2.0, atol=1e-5)


def test_velocities_are_taken_at_the_noisy_image_and_at_it_moved_as_far_as_the_edit_has_come():
    """Against the paper's algorithm 1, written with the edited image itself."""
    source, target = lambda x, t, d: jnp.cos(x) * t[:, None, None], lambda x, t, d: jnp.sin(2.0 * x) + d[:, None, None]
    sizes = jnp.arange(1.0, 7.0)
    plan = EditPlan(4, skip=1, average=2)
    edited = flow_edit(source, target, X, _noise, TIMES, plan, sizes)
    z = X
    for k in range(1, 4):
        t_B, d_B = jnp.full(3, TIMES[k]), jnp.full(3, sizes[k])
        differences = []
        for j in range(2):
            noisy = (1 - TIMES[k]) * X + TIMES[k] * _noise(k, j)
            differences.append(target(z + noisy - X, t_B, d_B) - source(noisy, t_B, d_B))
        z = z + (TIMES[k + 1] - TIMES[k]) * sum(differences) / 2
    np.testing.assert_allclose(edited, z, atol=1e-5)


def test_the_editor_guides_both_sides_away_from_the_unconditional_velocity(monkeypatch):
    made = lambda cfg, height, width: lambda params, condition: lambda x, t, d: x * 0 + condition.vec_BV[:, :, None]
    monkeypatch.setattr(editing, "make_velocity", made)
    latents = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    says = lambda value: Condition(jnp.zeros((2, 1, 1)), jnp.full((2, 1), value))
    draws = np.array([5, 5], np.uint32), np.array([0, 1], np.int32)
    editor = make_editor(tiny_assembly().model, (4, 4), 8, shift=3.0)
    edit = lambda *guidance: editor(None, latents, draws, says(0.5), says(2.0), EditPlan(2, 1), *guidance)
    np.testing.assert_allclose(edit(), latents - 0.75 * 1.5, atol=1e-6)  # t = 1/2 is shifted to 3/4
    guided = (0.25 + 3.0 * 1.75) - (0.25 + 2.0 * 0.25)
    np.testing.assert_allclose(edit(says(0.25), (2.0, 3.0)), latents - 0.75 * guided, atol=1e-5)


@pytest.mark.parametrize("numbers", [(0,), (4, -1), (4, 4), (4, 2, 2), (4, 0, -1), (4, 0, 0, 0)])
def test_plans_that_do_not_fit_are_refused(numbers):
    with pytest.raises(ValueError, match=f"an edit of {numbers[0]} steps"):
        make_plan(*numbers)
    assert make_plan(4, 1, 2, 3) == EditPlan(4, 1, 2, 3)
