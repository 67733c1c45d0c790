import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.core.types import Condition
from shortcut_jax.steps.networks import (
    Adapted,
    Networks,
    bind_adapters,
    evaluations,
    make_velocity,
    per_sample_mixture,
    teacher_weights,
    unconditional_rows,
)
from tests.helpers import POST_TRAINING, noisy_state, relative, tiny_assembly

ROWS = 8
TEACHER_B = jnp.arange(ROWS) % 3 == 0
KINDS = {
    "adapters": POST_TRAINING,
    "adapters with a LoRA teacher": POST_TRAINING | {"teacher_lora": "given"},
    "some layers": POST_TRAINING | {"lora__paths": r".*qkv|single_blocks/.*out|.*in_layer"},
    "all weights": POST_TRAINING | {"train": "all"},
}


def _setting(**changes):
    assembly = tiny_assembly(**changes)
    state = noisy_state(assembly)
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal((ROWS, *shape), np.float32))
    cfg = assembly.model
    guidance_B = jnp.linspace(1.0, 5.0, ROWS)
    condition = Condition(draw(8, cfg.text_width), draw(cfg.pooled_width), guidance_B)
    velocity_of = make_velocity(cfg, *assembly.latent_size)
    return state, velocity_of, condition, (draw(assembly.num_image_tokens, cfg.channels), jnp.linspace(0.1, 0.9, ROWS))


def _evaluator(velocity_of, inputs):
    """(weights, condition) -> velocities; weights of one structure share a program."""
    run = jax.jit(lambda weights, condition: velocity_of(weights, condition)(*inputs))
    return lambda weights, condition: np.asarray(run(weights, condition))


def _asked(pick, velocity_of, state, condition, inputs, mode):
    """What the velocity that `pick` takes of the networks of a state gives."""
    networks = lambda s: Networks(velocity_of, s.frozen, *s.ema, mode)
    return jax.jit(lambda s, c: pick(networks(s), c)(*inputs, None))(state, condition)


def _rows(mask_B, a, b):
    return np.where(np.asarray(mask_B)[:, None, None], a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_jump_in_one_pass_equals_two_passes(kind, highest_precision):
    state, velocity_of, condition, inputs = _setting(**KINDS[kind])
    run = _evaluator(velocity_of, inputs)
    weights = teacher_weights(state.frozen), *(bind_adapters(x, state.frozen) for x in state.ema)
    teacher, fast, slow = (run(w, condition) for w in weights)
    ask = lambda pick: _asked(pick, velocity_of, state, condition, inputs, "embedded")
    assert relative(ask(lambda n, c: n.first(c, TEACHER_B)), _rows(TEACHER_B, teacher, fast)) <= 1e-5
    assert relative(teacher, fast) > 1e-2
    np.testing.assert_array_equal(ask(lambda n, c: n.first(c, None)), fast)
    np.testing.assert_array_equal(ask(lambda n, c: n.slow(c)), slow)


def test_forward_mode_differentiates_the_network_that_learns(highest_precision):
    state, velocity_of, condition, (x, t) = _setting(objective="meanflow")
    networks = Networks(velocity_of, state.frozen, *state.ema, "embedded", online=state.params)
    d, h = 0.5 * t, 1e-4  # times are embedded by waves of up to 1,000 radians
    tangents = jnp.cos(x), jnp.ones_like(t), jnp.ones_like(d)
    value, slope = jax.jit(lambda *args: jax.jvp(networks.forward(condition), args, tangents))(x, t, d)
    student = jax.jit(networks.student(state.params, condition))
    np.testing.assert_allclose(value, student(x, t, d), rtol=1e-4, atol=1e-5)
    ahead, behind = (student(x + s * tangents[0], t + s, d + s) for s in (h, -h))
    assert relative(slope, (ahead - behind) / (2 * h)) <= 1e-2


def test_a_gain_of_zero_gives_exactly_the_base():
    state, velocity_of, condition, inputs = _setting(**POST_TRAINING)
    run = _evaluator(velocity_of, inputs)
    base = run(state.frozen.base, condition)
    mixed = lambda mask_B: run(per_sample_mixture(state.params, state.frozen, mask_B), condition)
    np.testing.assert_array_equal(mixed(jnp.ones(ROWS, bool)), base)
    mask, some = np.asarray(TEACHER_B), mixed(TEACHER_B)
    np.testing.assert_array_equal(some[mask], base[mask])
    assert (np.abs(some - base)[~mask].max(axis=(1, 2)) > 1e-3).all()


def test_an_adapter_adds_scale_times_its_product():
    state, velocity_of, condition, inputs = _setting(**POST_TRAINING)
    run = _evaluator(velocity_of, inputs)
    assert float(state.frozen.scale) == 2.0
    doubled = jax.tree_util.tree_map_with_path(lambda p, x: 2 * x if p[-1].key == "b" else x, state.params)
    strong = Adapted(state.frozen.base, state.params, jnp.float32(4.0))
    assert relative(run(bind_adapters(doubled, state.frozen), condition), run(strong, condition)) <= 1e-5


GUIDED = POST_TRAINING | {"guidance": (1.0, 5.0)}


def _guided(run, state, condition, weights):
    empty = unconditional_rows(state.frozen, condition)
    v_c, v_u = (run(weights, c) for c in (condition, empty))
    return v_u + np.asarray(condition.guidance_B)[:, None, None] * (v_c - v_u), v_c


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cfg", "distill", "cfg_targets"])
def test_guidance_enters_where_it_is_said_to(mode, highest_precision):
    state, velocity_of, condition, inputs = _setting(**GUIDED, guidance_mode=mode, model__guidance=mode != "cfg")
    frozen, ema, run = state.frozen, state.ema, _evaluator(velocity_of, inputs)
    of = lambda weights: _guided(run, state, condition, weights)
    (teacher, _), fast, slow, online = (
        of(w) for w in (teacher_weights(frozen), *(bind_adapters(x, frozen) for x in (*ema, state.params)))
    )
    plain = lambda pair, modes: pair[0] if mode in modes else pair[1]
    ask = lambda pick: _asked(pick, velocity_of, state, condition, inputs, mode)
    first = ask(lambda n, c: n.first(c, TEACHER_B))
    assert relative(first, _rows(TEACHER_B, teacher, plain(fast, ("cfg", "cfg_targets")))) <= 1e-5
    assert relative(ask(lambda n, c: n.slow(c)), plain(slow, ("cfg", "cfg_targets"))) <= 1e-5
    assert relative(ask(lambda n, c: n.student(state.params, c)), plain(online, ("cfg",))) <= 1e-5
    assert all(relative(guided, other) > 1e-2 for guided, other in (fast, slow, online))


@pytest.mark.slow
def test_gradients_flow_through_both_branches_of_a_guided_student():
    state, velocity_of, condition, inputs = _setting(**GUIDED, guidance_mode="cfg")

    def loss(params, condition, empty):
        frozen = state.frozen._replace(unconditional=empty)
        networks = Networks(velocity_of, frozen, *state.ema, "cfg")
        return jnp.sum(jnp.square(networks.student(params, condition)(*inputs, None)))

    # The derivative by each branch's text is there only where the branch is differentiated.
    by_text = jax.grad(loss, (1, 2))(state.params, condition, state.frozen.unconditional)
    assert all(np.abs(c.txt_BMT).max() > 1e-6 for c in by_text)


def test_evaluations_of_a_row():
    assert evaluations("embedded", adapters=True, teacher=True) == (1, 1, 1)
    assert evaluations("embedded", adapters=False, teacher=False) == (1, 1, 1)
    assert evaluations("embedded", adapters=False, teacher=True) == (1, 2, 1)
    assert evaluations("cfg", adapters=True, teacher=True) == (2, 2, 2)
    assert evaluations("distill", adapters=True, teacher=True) == (1, 2, 1)
    assert evaluations("cfg_targets", adapters=True, teacher=True) == (1, 2, 2)
