import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.core.ema import DualEma, EmaSettings, Memory, decay_at, init_ema, init_memory, staleness, update_ema

SETTINGS = EmaSettings(fast=0.5, slow=0.9)


def _params(dtype=jnp.float32):
    return {"a": jnp.array([1.0, -2.0, 3.0], dtype), "b": {"c": jnp.full((2, 2), 0.25, dtype)}}


def _zeros():
    return jax.tree.map(jnp.zeros_like, init_ema(_params()))


def _run(settings, start, params, num, first=0):
    update = jax.jit(lambda ema, memory, k: update_ema(ema, memory, params, k, settings)[:2])
    history, memory = [start], init_memory()
    for k in range(first, first + num):
        ema, memory = update(history[-1], memory, jnp.int32(k))
        history.append(ema)
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
    ema, memory = init_ema({"w": jnp.zeros(())}), init_memory()
    update = jax.jit(functools.partial(update_ema, settings=settings))
    for n in range(num):
        ema, memory, _ = update(ema, memory, {"w": jnp.float32(n)}, jnp.int32(n))
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
    ema, memory, restarted = start, init_memory(), []
    for k in range(7):
        ema, memory, _ = update_ema(ema, memory, weights[k], jnp.int32(k), settings)
        both = _is_equal(ema, DualEma(weights[k], weights[k]))
        assert both == (_is_equal(ema.fast, weights[k]) or _is_equal(ema.slow, weights[k]))
        restarted.append(both)
    assert [k + 1 for k in range(7) if restarted[k]] == [3, 6]
    assert int(memory.restarts) == 2
    np.testing.assert_allclose(memory.lag, (0.5, 0.9), rtol=1e-6)  # one update after the last restart


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


AUTO = EmaSettings(fast=0.9, slow=0.99, restart_auto=True)
SIZE = 4096


def _walk(weights_of, settings, num):
    """Runs weights_of(k), [SIZE], through the averages: after each step whether they restarted, and the staleness."""
    update = jax.jit(lambda ema, memory, w, k: update_ema(ema, memory, {"w": w}, k, settings))
    ema, memory = init_ema({"w": jnp.asarray(weights_of(0))}), init_memory()
    restarts, ratios = [], []
    for k in range(num):
        before = int(memory.restarts)
        ema, memory, ratio = update(ema, memory, jnp.asarray(weights_of(k + 1)), jnp.int32(k))
        restarts.append(int(memory.restarts) > before)
        ratios.append(float(ratio))
    return restarts, ratios, ema


def _scattered(speed, noise):
    direction = np.random.default_rng(0).standard_normal(SIZE)
    direction /= np.linalg.norm(direction)
    scatter = lambda k: np.random.default_rng(k + 1).standard_normal(SIZE) * noise / np.sqrt(SIZE)
    return lambda k: (speed * k * direction + scatter(k)).astype(np.float32)


def test_staleness_is_the_lag_of_the_slow_average_over_the_noise_a_restart_brings_back():
    speed, noise = 0.05, 2.0
    _, ratios, _ = _walk(_scattered(speed, noise), EmaSettings(0.9, 0.99, restart_auto=True, restart_ratio=1e9), 600)
    np.testing.assert_allclose(ratios[-1], speed * 99 / noise / np.sqrt(1 - 0.01 / 1.99), rtol=0.1)
    lag, kept = 0.99 * (1 - 0.99**60) / 0.01, 0.99**120 + (1 - 0.99**120) * 0.01 / 1.99
    np.testing.assert_allclose(np.mean(ratios[55:65]), speed * lag / noise / np.sqrt(1 - kept), rtol=0.25)


def test_weights_that_drift_restart_the_averages_and_weights_that_only_scatter_never_do():
    restarts, _, _ = _walk(_scattered(speed=1.0, noise=0.5), AUTO, 100)
    assert restarts.index(True) + 1 == 10  # 1 - 0.9^10 > 1 - 1/e: the fast average has forgotten the start
    assert np.diff(np.flatnonzero(restarts)).tolist() == [10] * 9
    restarts, ratios, _ = _walk(_scattered(speed=0.0, noise=0.5), AUTO, 400)
    assert not any(restarts) and max(ratios[10:]) < 0.7


def test_a_restart_comes_when_the_lag_passes_the_noise():
    speed, noise = 0.05, 2.0
    restarts, ratios, _ = _walk(_scattered(speed, noise), AUTO, 200)
    first = restarts.index(True)
    assert ratios[first] > 1.0 and max(ratios[9:first]) <= 1.0
    # (speed x lag)^2 = noise^2 (1 - 0.99^2n) with lag = 99 (1 - 0.99^n) at n = 35.
    assert 25 <= first <= 45


def test_an_automatic_restart_sets_both_to_the_weights_and_forgets():
    settings = EmaSettings(0.5, 0.9, restart_auto=True)
    params = _params()
    ema = DualEma(*(jax.tree.map(lambda p, s=s: p - s, params) for s in (0.5, 5.0)))
    memory = Memory(jnp.array([1.0, 9.0]), jnp.array([0.3, 0.1]), jnp.int32(3))
    ema, memory, ratio = update_ema(ema, memory, params, jnp.int32(100), settings)
    assert float(ratio) > 1.0 and int(memory.restarts) == 4
    chex.assert_trees_all_equal(ema, DualEma(params, params))
    chex.assert_trees_all_equal(memory, init_memory()._replace(restarts=jnp.int32(4)))


def test_staleness_of_averages_that_are_the_weights_is_zero():
    zero, decay_2 = jnp.zeros(2), jnp.array([0.9, 0.99])
    assert float(staleness(zero, decay_2, init_memory())) == 0.0
    assert float(staleness(zero, decay_2, Memory(jnp.array([5.0, 9.0]), jnp.array([0.3, 0.1]), jnp.int32(3)))) == 0.0


def test_the_memory_follows_the_decays_of_the_warm_up():
    settings = EmaSettings(fast=0.9, slow=0.99, warmup=True)
    memory, lag, noise = init_memory(), [0.0, 0.0], [1.0, 1.0]
    for k in range(30):
        _, memory, _ = update_ema(init_ema(_params()), memory, _params(), jnp.int32(k), settings)
        decays = [min(d, (1 + k) / (10 + k)) for d in (0.9, 0.99)]
        lag = [d * (x + 1) for d, x in zip(decays, lag, strict=True)]
        noise = [d * d * x + (1 - d) ** 2 for d, x in zip(decays, noise, strict=True)]
    np.testing.assert_allclose(memory.lag, lag, rtol=1e-5)
    np.testing.assert_allclose(memory.noise, noise, rtol=1e-5)
