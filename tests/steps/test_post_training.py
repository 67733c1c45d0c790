import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.config.derive import step_settings
from shortcut_jax.core.loss_spikes import init_spikes
from shortcut_jax.core.tree import flat_paths
from shortcut_jax.diagnostics.compiled_step import random_batch
from shortcut_jax.steps import networks
from shortcut_jax.steps.networks import Networks, bind_adapters, make_velocity, teacher_weights
from shortcut_jax.steps.state import choose_view, from_items, to_counters, to_items
from shortcut_jax.steps.train_step import loss_and_gradients, make_rows
from tests.helpers import POST_TRAINING, host_copy, moved, noisy_state, relative, tiny_assembly

TEACHERS = {
    "base": POST_TRAINING,
    "LoRA": POST_TRAINING | {"teacher_lora": "given"},
    "all weights": POST_TRAINING | {"train": "all"},
}


@pytest.fixture(scope="module", params=TEACHERS)
def assembly(request):
    return tiny_assembly(**TEACHERS[request.param])


@pytest.fixture(scope="module")
def lora():
    return tiny_assembly(**POST_TRAINING)


@pytest.mark.slow
def test_a_step_moves_what_is_trained_and_nothing_that_is_frozen(assembly):
    state = noisy_state(assembly)
    before = host_copy(state)
    after, metrics = assembly.train_step(state, random_batch(assembly))
    assert all(moved(before.params, after.params).values())
    assert all(moved(before.ema.slow, after.ema.slow).values())
    assert not any(moved(before.frozen, after.frozen).values())
    shares = {k: float(metrics[f"loss/{k}"]) for k in ("teacher", "self")}
    assert min(shares.values()) < float(metrics["loss"]) < max(shares.values())


def test_the_base_is_bfloat16_and_has_no_moments_averages_or_place_in_a_checkpoint(lora):
    state = lora.state_shapes
    base = flat_paths(state.frozen.base)
    assert {x.dtype for x in base.values()} == {jnp.dtype(jnp.bfloat16)}
    trained = flat_paths(state.params)
    assert {x.dtype for x in trained.values()} == {jnp.dtype(jnp.float32)}
    assert all(path.endswith(("/a", "/b")) for path in trained)
    layers = {p.removesuffix("/kernel") for p in base if p.endswith("/kernel")}
    assert {p.rpartition("/")[0] for p in trained} == layers  # every linear layer
    for tree in (state.ema.fast, state.ema.slow):
        assert flat_paths(tree).keys() == trained.keys()
    items = to_items(state)
    assert not any("kernel" in path for path in flat_paths(items))
    moments = [x for path, x in flat_paths(items["optimizer"]).items() if path.endswith(("/a", "/b"))]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in trained.values())


def test_training_starts_as_the_base_and_a_teachers_student_as_a_copy_of_it():
    fresh = tiny_assembly(**POST_TRAINING).init_state()
    assert not any(np.any(x) for path, x in flat_paths(fresh.params).items() if path.endswith("/b"))
    copied = tiny_assembly(**TEACHERS["LoRA"])
    weights = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), copied.network_shapes)
    teacher = noisy_state(copied).params
    state = copied.init_state(weights, None, teacher)
    for tree in (state.params, state.frozen.teacher, state.ema.fast, state.ema.slow):
        assert not any(moved(teacher, tree).values())
    everything = tiny_assembly(**TEACHERS["all weights"]).init_state()
    assert relative(everything.frozen.base, everything.params) < 5e-3
    assert not any(moved(everything.params, everything.ema.slow).values())


@pytest.mark.slow
def test_loss_and_gradients_equal_those_of_two_passes(assembly, highest_precision, monkeypatch):
    settings = step_settings(assembly.settings, assembly.model)
    velocity_of = make_velocity(assembly.model, *assembly.latent_size)
    state, rows = noisy_state(assembly), make_rows(settings, jax.random.key(3), random_batch(assembly))
    evaluate = lambda: jax.jit(lambda s, r: loss_and_gradients(settings, velocity_of, s, r))(state, rows)
    loss, parts, grads = evaluate()

    class TwoPasses(Networks):
        def first(self, condition, teacher_B):
            teacher, fast = (
                velocity_of(w, condition)
                for w in (teacher_weights(self._frozen), bind_adapters(self._fast, self._frozen))
            )
            return lambda x, t, d: jnp.where(teacher_B[:, None, None], teacher(x, t, d), fast(x, t, d))

    monkeypatch.setattr("shortcut_jax.steps.train_step.Networks", TwoPasses)
    loss2, parts2, grads2 = evaluate()
    assert abs(float(loss) - float(loss2)) <= 1e-5 * float(loss2)
    assert relative(grads, grads2) <= 1e-4
    np.testing.assert_allclose(np.ravel(list(parts.values())), np.ravel(list(parts2.values())), rtol=1e-4)
    kinds = np.asarray(rows.draws.teacher_B)
    assert 0 < kinds.sum() < len(kinds)


@pytest.mark.parametrize("name", ["base", "teacher", "fast", "slow"])
def test_the_target_reads_every_network_and_no_gradient_reaches_them(name, highest_precision):
    assembly = tiny_assembly(**TEACHERS["LoRA"])
    settings = step_settings(assembly.settings, assembly.model)
    velocity_of = make_velocity(assembly.model, *assembly.latent_size)
    state, rows = noisy_state(assembly), make_rows(settings, jax.random.key(3), random_batch(assembly))

    def loss(tree):
        changed = (
            state._replace(ema=state.ema._replace(**{name: tree}))
            if name in ("fast", "slow")
            else state._replace(frozen=state.frozen._replace(**{name: tree}))
        )
        # The student's own base is not asked here: it is the same array, but another use of it.
        student = changed._replace(frozen=changed.frozen._replace(base=jax.lax.stop_gradient(changed.frozen.base)))
        return loss_and_gradients(settings, velocity_of, student if name != "base" else changed, rows)[0]

    given = getattr(state.ema, name) if name in ("fast", "slow") else getattr(state.frozen, name)
    evaluate = jax.jit(jax.value_and_grad(loss))
    value, slope = evaluate(given)
    larger = jax.tree.map(lambda x: (1.2 * x).astype(x.dtype), given)
    assert abs(float(evaluate(larger)[0]) - float(value)) > 1e-4 * float(value)
    assert name == "base" or not any(np.any(g) for g in jax.tree.leaves(slope))


def test_rank_stabilised_adapters_are_scaled_by_the_root_of_the_rank():
    plain, stabilised = (
        tiny_assembly(**POST_TRAINING | {"lora__rank": 4, "lora__rslora": on}).init_state() for on in (False, True)
    )
    assert float(plain.frozen.scale) == 1.5 and float(stabilised.frozen.scale) == 3.0


@pytest.mark.slow
def test_a_run_without_teacher_rows_is_plain_lora_training():
    assembly = tiny_assembly(train="lora", init_from="given", objective="flow", lora__rank=2)
    state = noisy_state(assembly)
    after, metrics = assembly.train_step(state, random_batch(assembly))
    assert set(metrics) >= {"loss/flow"} and "loss/teacher" not in metrics
    assert np.isfinite(metrics["loss"]) and after.frozen.teacher is None


def test_the_mixed_step_compiles_once(lora):
    state, before = noisy_state(lora), lora.train_step._cache_size()
    for seed in range(3):
        state, _ = lora.train_step(state, random_batch(lora, seed))
    assert lora.train_step._cache_size() == max(before, 1)


@pytest.mark.slow
def test_a_step_with_guided_targets_runs():
    """Those of cfg are in test_sharding, of distill in test_adapter_outputs."""
    guided = {"guidance_mode": "cfg_targets", "guidance": (1.0, 4.0), "model__guidance": True}
    assembly = tiny_assembly(**POST_TRAINING, **guided)
    after, metrics = assembly.train_step(noisy_state(assembly), random_batch(assembly))
    assert np.isfinite(metrics["loss"]) and int(after.skipped_total) == 0


@pytest.mark.slow
def test_micro_batches_give_the_same_update_and_parts_as_one_batch(lora, highest_precision):
    split = tiny_assembly(**POST_TRAINING, accumulate=4)
    one, two = (a.train_step(noisy_state(a), random_batch(a)) for a in (lora, split))
    assert relative(two[0].params, one[0].params) <= 1e-5
    for name, value in one[1].items():
        np.testing.assert_allclose(two[1][name], value, rtol=1e-4, err_msg=name)


def test_a_state_comes_back_from_its_items_counters_and_frozen_part(lora):
    state = noisy_state(lora)._replace(step=jnp.int32(7), skipped_total=jnp.int32(2))
    state = state._replace(spikes=state.spikes._replace(seen=jnp.int32(3), mean=jnp.float32(1 / 3)))
    back = from_items(to_items(state), to_counters(state), state.frozen)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert not any(moved(state, back).values())
    older = {**to_counters(state), "memory": {"lag": [0.0, 0.0], "noise": [1.0, 1.0], "restarts": 0}}
    assert not any(moved(state, from_items(to_items(state), older, state.frozen)).values())
    never = state._replace(spikes=init_spikes())  # its rule was never on, or is newer than what is stored
    assert "spikes" not in to_counters(never)
    assert int(from_items(to_items(never), to_counters(never), state.frozen).spikes.seen) == 0


def test_views_are_whole_networks(lora):
    state = noisy_state(lora)
    for view, tree in (("online", state.params), ("fast", state.ema.fast), ("slow", state.ema.slow)):
        chosen = choose_view(state, view)
        assert isinstance(chosen, networks.Adapted) and chosen.lora is tree and chosen.base is state.frozen.base
    assert choose_view(state, "teacher") is state.frozen.base


@pytest.mark.slow
def test_a_restart_is_a_step_of_the_run_and_is_counted():
    assembly = tiny_assembly(**POST_TRAINING, ema__restart_every=2, optimizer__learning_rate=0.1)
    state, restarts = noisy_state(assembly), []
    for seed in range(4):
        state, metrics = assembly.train_step(state, random_batch(assembly, seed))
        restarts.append(int(metrics["ema_restarts"]))
        same = not any(moved(state.params, state.ema.slow).values())
        assert same == bool(seed % 2)
    assert restarts == [0, 1, 1, 2]


@pytest.mark.slow
def test_the_gradient_of_the_frozen_base_is_not_computed():
    def counted(**changes):
        # Unrolled, so that XLA counts each block.
        changes |= {"objective": "flow", "model__preset": "digits", "model__scan_unroll": 2, "lora__rank": 1}
        assembly = tiny_assembly(**changes)
        compiled = assembly.train_step.lower(assembly.state_shapes, assembly.batch_shapes()).compile()
        return compiled.cost_analysis()["flops"], assembly.flops()

    (full, full_model), (lora, lora_model) = counted(), counted(train="lora", init_from="given")
    assert lora_model / full_model == pytest.approx(2 / 3)
    assert lora / full == pytest.approx(2 / 3, abs=0.03)
