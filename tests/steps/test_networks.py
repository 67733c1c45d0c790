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


def _rows(mask_B, a, b):
    return np.where(np.asarray(mask_B)[:, None, None], a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_jump_in_one_pass_equals_two_passes(kind, highest_precision):
    state, velocity_of, condition, inputs = _setting(**KINDS[kind])
    networks = Networks(velocity_of, state.frozen, state.ema.fast, state.ema.slow, "told")
    run = lambda weights: jax.jit(velocity_of(weights, condition))(*inputs)
    teacher, fast = run(teacher_weights(state.frozen)), run(bind_adapters(state.ema.fast, state.frozen))
    both = jax.jit(networks.first(condition, TEACHER_B))(*inputs, None)
    assert relative(both, _rows(TEACHER_B, teacher, fast)) <= 1e-5
    assert relative(teacher, fast) > 1e-2
    np.testing.assert_array_equal(jax.jit(networks.first(condition, None))(*inputs, None), fast)
    slow = jax.jit(networks.slow(condition))(*inputs, None)
    np.testing.assert_array_equal(slow, run(bind_adapters(state.ema.slow, state.frozen)))


def test_forward_mode_differentiates_the_network_that_learns(highest_precision):
    state, velocity_of, condition, (x, t) = _setting(objective="meanflow")
    networks = Networks(velocity_of, state.frozen, *state.ema, "told", online=state.params)
    d, h = 0.5 * t, 1e-4  # times are embedded by waves of up to 1,000 radians
    tangents = jnp.cos(x), jnp.ones_like(t), jnp.ones_like(d)
    value, slope = jax.jit(lambda *args: jax.jvp(networks.forward(condition), args, tangents))(x, t, d)
    student = jax.jit(networks.student(state.params, condition))
    np.testing.assert_allclose(value, student(x, t, d), rtol=1e-4, atol=1e-5)
    ahead, behind = (student(x + s * tangents[0], t + s, d + s) for s in (h, -h))
    assert relative(slope, (ahead - behind) / (2 * h)) <= 1e-2


def test_a_gain_of_zero_gives_exactly_the_base():
    state, velocity_of, condition, inputs = _setting(**POST_TRAINING)
    run = lambda weights: np.asarray(jax.jit(velocity_of(weights, condition))(*inputs))
    base = run(state.frozen.base)
    np.testing.assert_array_equal(run(per_sample_mixture(state.params, state.frozen, jnp.ones(ROWS, bool))), base)
    mask = np.asarray(TEACHER_B)
    some = run(per_sample_mixture(state.params, state.frozen, TEACHER_B))
    np.testing.assert_array_equal(some[mask], base[mask])
    assert (np.abs(some - base)[~mask].max(axis=(1, 2)) > 1e-3).all()


def test_an_adapter_adds_scale_times_its_product():
    state, velocity_of, condition, inputs = _setting(**POST_TRAINING)
    run = lambda weights: jax.jit(velocity_of(weights, condition))(*inputs)
    assert float(state.frozen.scale) == 2.0
    doubled = jax.tree_util.tree_map_with_path(lambda p, x: 2 * x if p[-1].key == "b" else x, state.params)
    strong = Adapted(state.frozen.base, state.params, jnp.float32(4.0))
    assert relative(run(bind_adapters(doubled, state.frozen)), run(strong)) <= 1e-5


GUIDED = POST_TRAINING | {"guidance": (1.0, 5.0)}


def _guided(state, velocity_of, condition, inputs, weights):
    empty = unconditional_rows(state.frozen, condition)
    v_c, v_u = (np.asarray(jax.jit(velocity_of(weights, c))(*inputs)) for c in (condition, empty))
    return v_u + np.asarray(condition.guidance_B)[:, None, None] * (v_c - v_u), v_c


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["both", "teacher", "targets"])
def test_guidance_enters_where_it_is_said_to(guide, highest_precision):
    state, velocity_of, condition, inputs = _setting(**GUIDED, guide=guide, model__guidance=guide != "both")
    frozen, ema = state.frozen, state.ema
    networks = Networks(velocity_of, frozen, ema.fast, ema.slow, guide)
    of = lambda weights: _guided(state, velocity_of, condition, inputs, weights)
    (teacher, _), fast, slow, online = (
        of(w) for w in (teacher_weights(frozen), *(bind_adapters(x, frozen) for x in (*ema, state.params)))
    )
    plain = lambda pair, guides: pair[0] if guide in guides else pair[1]
    run = lambda velocity: jax.jit(velocity)(*inputs, None)
    first = run(networks.first(condition, TEACHER_B))
    assert relative(first, _rows(TEACHER_B, teacher, plain(fast, ("both", "targets")))) <= 1e-5
    assert relative(run(networks.slow(condition)), plain(slow, ("both", "targets"))) <= 1e-5
    assert relative(run(networks.student(state.params, condition)), plain(online, ("both",))) <= 1e-5
    assert all(relative(guided, other) > 1e-2 for guided, other in (fast, slow, online))


@pytest.mark.slow
def test_gradients_flow_through_both_branches_of_a_guided_student():
    state, velocity_of, condition, inputs = _setting(**GUIDED, guide="both")

    def loss(params, condition, empty):
        frozen = state.frozen._replace(unconditional=empty)
        networks = Networks(velocity_of, frozen, *state.ema, "both")
        return jnp.sum(jnp.square(networks.student(params, condition)(*inputs, None)))

    # The derivative by each branch's text is there only where the branch is differentiated.
    by_text = jax.grad(loss, (1, 2))(state.params, condition, state.frozen.unconditional)
    assert all(np.abs(c.txt_BMT).max() > 1e-6 for c in by_text)


def test_evaluations_of_a_row():
    assert evaluations("told", adapters=True, teacher=True) == (1, 1, 1)
    assert evaluations("told", adapters=False, teacher=False) == (1, 1, 1)
    assert evaluations("told", adapters=False, teacher=True) == (1, 2, 1)
    assert evaluations("both", adapters=True, teacher=True) == (2, 2, 2)
    assert evaluations("teacher", adapters=True, teacher=True) == (1, 2, 1)
    assert evaluations("targets", adapters=True, teacher=True) == (1, 2, 2)
