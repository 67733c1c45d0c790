import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.core.tree import flat_paths
from shortcut_jax.diagnostics.compiled_step import random_batch
from shortcut_jax.steps.objectives import OBJECTIVES
from tests.helpers import host_copy, moved, noisy_state, relative, tiny_assembly


@pytest.fixture(scope="module")
def scfm():
    return tiny_assembly()


def test_a_step_moves_weights_moments_and_averages_and_counts(scfm):
    state = noisy_state(scfm)
    before = host_copy(state)
    after, metrics = scfm.train_step(state, random_batch(scfm))
    assert all(moved(before.params, after.params).values())
    assert all(moved(before.ema.fast, after.ema.fast).values())
    assert all(moved(before.ema.slow, after.ema.slow).values())
    assert int(after.step) == 1 and int(after.skipped_total) == 0
    assert np.isclose(float(metrics["loss"]), 0.25 * metrics["loss/self"] + 0.75 * metrics["loss/flow"], rtol=1e-5)
    expected = {"loss", "loss/self", "loss/flow", "grad_norm", "param_norm", "learning_rate", "skipped"}
    expected |= {"skipped_total", "ema_distance/fast", "ema_distance/slow", "ema_restarts"}
    assert expected == set(metrics)


def test_the_state_is_donated(scfm):
    state = noisy_state(scfm)
    batch = random_batch(scfm)
    scfm.train_step(state, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not any(x.is_deleted() for x in jax.tree.leaves(batch))


def test_the_learning_rate_told_is_that_of_the_updates_done():
    assembly = tiny_assembly(objective="flow", optimizer__warmup_steps=10, optimizer__learning_rate=0.5)
    counters = {"step": jnp.int32(4), "skipped_total": jnp.int32(1)}
    state = noisy_state(assembly)._replace(**counters)
    _, metrics = assembly.train_step(state, random_batch(assembly))
    assert float(metrics["learning_rate"]) == pytest.approx(0.15)


def test_averages_follow_the_weights_by_their_decays(scfm):
    state = noisy_state(scfm)
    before = host_copy(state)
    after, _ = scfm.train_step(state, random_batch(scfm))
    for name, decay in (("fast", 0.99), ("slow", 0.999)):
        old, new = flat_paths(getattr(before.ema, name)), flat_paths(getattr(after.ema, name))
        for path, weights in flat_paths(after.params).items():
            np.testing.assert_allclose(new[path], decay * old[path] + (1 - decay) * weights, rtol=1e-5, atol=1e-7)


def test_a_non_finite_step_changes_nothing_but_the_counters_and_the_next_one_recovers(scfm):
    state = noisy_state(scfm)
    before = host_copy(state)
    batch = random_batch(scfm)
    broken = batch._replace(latents_BhwC=batch.latents_BhwC.at[3, 0, 0, 0].set(jnp.nan))
    state, metrics = scfm.train_step(state, broken)
    for field in ("params", "ema", "opt_state"):
        assert not any(moved(getattr(before, field), getattr(state, field)).values()), field
    assert (int(state.step), int(state.skipped), int(state.skipped_total)) == (1, 1, 1)
    assert int(metrics["skipped"]) == 1 and np.isfinite(metrics["param_norm"])
    state, metrics = scfm.train_step(state, batch)
    assert (int(state.step), int(state.skipped), int(state.skipped_total)) == (2, 0, 1)
    assert np.isfinite(metrics["loss"])


def test_draws_differ_between_steps(scfm):
    batch = random_batch(scfm)
    losses = {
        float(scfm.train_step(noisy_state(scfm)._replace(step=jnp.int32(k)), batch)[1]["loss"]) for k in (0, 1, 2)
    }
    assert len(losses) == 3


@pytest.mark.slow
def test_micro_batches_give_the_same_update_as_one_batch(scfm, highest_precision):
    split = tiny_assembly(accumulate=2)
    one, two = (a.train_step(noisy_state(a), random_batch(a)) for a in (scfm, split))
    assert relative(two[0].params, one[0].params) <= 1e-5
    assert relative(two[0].ema, one[0].ema) <= 1e-5
    for name, value in one[1].items():
        np.testing.assert_allclose(two[1][name], value, rtol=1e-4, err_msg=name)


def test_the_target_reads_both_averages(scfm):
    batch = random_batch(scfm)
    base = float(scfm.train_step(noisy_state(scfm), batch)[1]["loss/self"])
    for name in ("fast", "slow"):
        state = noisy_state(scfm)
        changed = jax.tree.map(lambda x: x * 1.1, getattr(state.ema, name))
        state = state._replace(ema=state.ema._replace(**{name: changed}))
        assert abs(float(scfm.train_step(state, batch)[1]["loss/self"]) - base) > 1e-4 * base, name


def test_flow_ignores_the_averages():
    assembly = tiny_assembly(objective="flow")
    batch = random_batch(assembly)
    state, other = noisy_state(assembly), noisy_state(assembly)
    other = other._replace(ema=jax.tree.map(lambda x: 2 * x, other.ema))
    after, metrics = assembly.train_step(state, batch)
    after_other, _ = assembly.train_step(other, batch)
    assert not any(moved(after.params, after_other.params).values())
    assert set(metrics) >= {"loss", "loss/flow"} and "loss/self" not in metrics


@pytest.mark.slow
@pytest.mark.parametrize("objective", [name for name, row in OBJECTIVES.items() if row.needs_step_size])
def test_a_model_that_is_told_its_step_size_learns_that_input(objective):
    assembly = tiny_assembly(objective=objective)
    state = noisy_state(assembly)
    before = host_copy(state.params["step_in"])
    after, metrics = assembly.train_step(state, random_batch(assembly))
    assert all(moved(before, after.params["step_in"]).values())
    assert np.isfinite(metrics["loss/self"])


def test_an_adaptive_weight_changes_what_is_learned_and_not_the_loss_that_is_told():
    plain, adaptive = (tiny_assembly(objective="flow", adaptive_power=power) for power in (0.0, 1.0))
    batch = random_batch(plain)
    (one, told), (two, same) = (a.train_step(noisy_state(a), batch) for a in (plain, adaptive))
    assert float(told["loss"]) == pytest.approx(float(same["loss"]), rel=1e-6)
    # All rows have about the same error: the weight divides by its sum over the values of a row.
    size = batch.latents_BhwC[0].size * float(told["loss"])
    assert float(told["grad_norm"]) / float(same["grad_norm"]) == pytest.approx(size, rel=0.3)
    assert any(moved(one.params, two.params).values())


def test_rolled_rows_need_no_images():
    assembly = tiny_assembly(rows__self_rows=0, rows__flow_rows=0, rows__rolled_rows=1, init_from="given")
    batch = random_batch(assembly)
    other = batch._replace(latents_BhwC=batch.latents_BhwC + 1.0)
    (state, metrics), (same, _) = (assembly.train_step(noisy_state(assembly), b) for b in (batch, other))
    assert not any(moved(state.params, same.params).values())
    assert float(metrics["loss/rolled"]) == pytest.approx(float(metrics["loss"])) and float(metrics["loss"]) > 0
