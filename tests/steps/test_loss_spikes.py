"""Spikes in the train step: skipped, counted, remembered in a checkpoint; and no difference where the rule is off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.diagnostics.compiled_step import random_batch
from shortcut_jax.steps.state import from_items, to_counters, to_items
from tests.helpers import host_copy, moved, noisy_state, tiny_assembly


@pytest.fixture(scope="module")
def careful():
    return tiny_assembly(spikes__factor=3.0, spikes__after=2, max_skipped=2)


def _run(assembly, scales, state=None):
    state = noisy_state(assembly) if state is None else state
    batch = random_batch(assembly)
    for scale in scales:
        before = host_copy(state)
        large = batch._replace(latents_BhwC=batch.latents_BhwC * scale)
        state, metrics = assembly.train_step(state, large)
    return before, state, metrics


@pytest.mark.slow
def test_a_spike_changes_nothing_but_the_counters_and_the_next_step_goes_on(careful):
    before, state, metrics = _run(careful, [1.0, 1.0, 1000.0])
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    for field in ("params", "ema", "opt_state"):
        assert not any(moved(getattr(before, field), getattr(state, field)).values()), field
    assert (int(state.step), int(state.skipped), int(state.skipped_total), int(metrics["spikes"])) == (3, 1, 1, 1)
    assert int(state.spikes.seen) == 2 and float(state.spikes.mean) == float(before.spikes.mean)
    before, state, metrics = _run(careful, [1.0], state)
    assert all(moved(before.params, state.params).values())
    assert (int(state.skipped), int(state.skipped_total), int(metrics["spikes"])) == (0, 1, 1)


def test_a_step_that_is_not_finite_is_skipped_and_no_spike(careful):
    _, state, metrics = _run(careful, [1.0, 1.0, np.nan])
    assert int(state.skipped_total) == 1 and int(metrics["spikes"]) == 0
    assert np.isfinite(state.spikes.mean)


@pytest.mark.slow
def test_steps_below_the_limit_are_those_of_a_run_without_the_rule(careful):
    plain = tiny_assembly()
    (_, with_rule, metrics), (_, without, plain_metrics) = _run(careful, [1.0] * 4), _run(plain, [1.0] * 4)
    assert "spikes" in metrics and "spikes" not in plain_metrics
    for field in ("params", "ema", "opt_state"):
        leaves = zip(*(jax.tree.leaves(getattr(s, field)) for s in (with_rule, without)), strict=True)
        assert all(np.array_equal(a, b) for a, b in leaves), field
    assert int(without.spikes.seen) == 0 and "spikes" not in to_counters(without)


def test_the_memory_comes_back_from_a_checkpoint_exactly_and_older_ones_have_none(careful):
    _, state, _ = _run(careful, [1.0, 1.0, 1000.0])
    counters = to_counters(state)
    restored = from_items(to_items(state), counters, state.frozen)
    assert all(a.dtype == b.dtype and a == b for a, b in zip(restored.spikes, state.spikes, strict=True))
    del counters["spikes"]
    assert from_items(to_items(state), counters, state.frozen).spikes == (jnp.zeros(()), 0, 0)
