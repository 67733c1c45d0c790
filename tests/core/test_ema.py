import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.core.ema import DualEma, EmaSettings, decay_at, init_ema, num_restarts, update_ema

SETTINGS = EmaSettings(fast=0.5, slow=0.9)


def _params(dtype=jnp.float32):
    return {"a": jnp.array([1.0, -2.0, 3.0], dtype), "b": {"c": jnp.full((2, 2), 0.25, dtype)}}


def _zeros():
    return jax.tree.map(jnp.zeros_like, init_ema(_params()))


def _run(settings, start, params, num, first=0):
    update = jax.jit(lambda ema, k: update_ema(ema, params, k, settings))
    history = [start]
    for k in range(first, first + num):
        history.append(update(history[-1], jnp.int32(k)))
    return history[1:]


def _assert_scaled(tree, params, factor):
    chex.assert_trees_all_close(tree, jax.tree.map(lambda p: factor * p.astype(jnp.float32), params), rtol=1e-5)


def _is_equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def test_constant_weights_give_the_closed_form():
    start = DualEma(*(jax.tree.map(lambda p: 5.0 * p, _params()) for _ in range(2)))
    for n, ema in enumerate(_run(SETTINGS, start, _params(), 6), 1):
        for tree, decay in ((ema.fast, 0.5), (ema.slow, 0.9)):
            _assert_scaled(tree, _params(), 5.0 * decay**n + 1.0 - decay**n)


def test_default_decays_are_the_published_ones():
    (ema,) = _run(EmaSettings(), _zeros(), _params(), 1)
    _assert_scaled(ema.fast, _params(), 0.01)
    chex.assert_trees_all_close(ema.slow, jax.tree.map(lambda p: 0.001 * p, _params()), rtol=1e-4)


def test_warm_up_limits_the_decay_until_it_reaches_its_own():
    decays = [float(decay_at(0.99, jnp.int32(n), True)) for n in (0, 1, 8, 90, 889, 891, 5000)]
    np.testing.assert_allclose(decays, [0.1, 2 / 11, 0.5, 0.91, 890 / 899, 0.99, 0.99], rtol=1e-5)
    assert decay_at(0.99, jnp.int32(0), False) == np.float32(0.99)


def test_the_first_update_under_warm_up_takes_nine_tenths_of_the_weights():
    (ema,) = _run(EmaSettings(warmup=True), _zeros(), _params(), 1)
    _assert_scaled(ema.fast, _params(), 0.9)
    _assert_scaled(ema.slow, _params(), 0.9)


def test_a_ratio_keeps_the_fast_averages_memory_shorter_during_the_warm_up():
    """Weights that move by 1 an update: a decay limited to (1 + n) / (k + n) trails them by n / k in the long run."""
    settings, num = EmaSettings(fast=0.999, slow=0.9999, warmup=True, warmup_ratio=3.0), 600
    ema = init_ema({"w": jnp.zeros(())})
    update = jax.jit(functools.partial(update_ema, settings=settings))
    for n in range(num):
        ema = update(ema, {"w": jnp.float32(n)}, jnp.int32(n))
    fast, slow = (num - 1 - float(tree["w"]) for tree in ema)
    assert fast == pytest.approx(num / 28, rel=0.03) and slow == pytest.approx(num / 10, rel=0.03)
    assert float(decay_at(0.99, jnp.int32(90), True, 3.0)) == pytest.approx(91 / 118)
    assert float(decay_at(0.99, jnp.int32(90), True, 1.0)) == float(decay_at(0.99, jnp.int32(90), True))


def test_without_a_dual_average_both_are_the_slow_one():
    settings = EmaSettings(fast=0.5, slow=0.9, warmup=True, warmup_ratio=3.0)
    dual, single = (_run(s, _zeros(), _params(), 40)[-1] for s in (settings, dataclasses.replace(settings, dual=False)))
    chex.assert_trees_all_equal(single.fast, single.slow)
    chex.assert_trees_all_equal(single.slow, dual.slow)
    assert not _is_equal(dual.fast, dual.slow)


def test_a_restart_sets_both_to_the_weights_at_multiples_of_its_period_only():
    settings = EmaSettings(fast=0.5, slow=0.9, restart_every=3)
    start = _zeros()
    plain = _run(SETTINGS, start, _params(), 2)
    history = _run(settings, start, _params(), 3)
    chex.assert_trees_all_equal(history[:2], plain)
    chex.assert_trees_all_equal(history[2], DualEma(_params(), _params()))

    weights = [_params()] + [jax.tree.map(lambda p, k=k: p * (k + 2.0), _params()) for k in range(7)]
    ema, restarted = start, []
    for k in range(7):
        ema = update_ema(ema, weights[k], jnp.int32(k), settings)
        both = _is_equal(ema, DualEma(weights[k], weights[k]))
        assert both == (_is_equal(ema.fast, weights[k]) or _is_equal(ema.slow, weights[k]))
        restarted.append(both)
    assert [k + 1 for k in range(7) if restarted[k]] == [3, 6]
    assert [int(num_restarts(jnp.int32(k + 1), settings)) for k in range(7)] == [0, 0, 1, 1, 1, 2, 2]
    assert int(num_restarts(jnp.int32(7), SETTINGS)) == 0


def test_averages_of_bfloat16_weights_stay_float32_and_move():
    params = _params(jnp.bfloat16)
    ema = init_ema(params)
    moved = jax.tree.map(lambda p: p * 1.5, params)
    for restart_every in (0, 1):
        (after,) = _run(EmaSettings(slow=0.999, restart_every=restart_every), ema, moved, 1)
        assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype(jnp.float32)}
        assert not jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).any()), after, ema))


def test_initial_averages_are_float32_copies_that_share_no_buffer():
    params = _params()
    ema = init_ema(params)
    chex.assert_trees_all_equal(ema, DualEma(params, params))
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, ema))]
    assert len(set(buffers)) == len(buffers)
    half = init_ema(_params(jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("restart_every", [0, 2])
def test_the_two_averages_do_not_mix(restart_every):
    zeros, ones = (jax.tree.map(lambda p, v=v: jnp.full_like(p, v), _params()) for v in (0.0, 1.0))
    settings = EmaSettings(fast=0.5, slow=0.9, restart_every=restart_every)
    (ema,) = _run(settings, DualEma(ones, zeros), zeros, 1)
    np.testing.assert_allclose(ema.fast["a"], 0.5)
    assert not np.any(ema.slow["a"])
