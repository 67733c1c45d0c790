import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.core.latents import image_ids
from shortcut_jax.core.rotary import rotary_phases, rotate, sinusoidal_embedding

AXES, THETA = (4, 6, 6), 10_000.0


def _heads(seed, tokens=1, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), (2, tokens, 3, sum(AXES)), dtype)


def _at(x, position):
    ids = jnp.broadcast_to(jnp.asarray(position, jnp.float32), (x.shape[1], 3))
    return rotate(x, *rotary_phases(ids, AXES, THETA))


def test_phases_are_the_positions_times_the_frequencies_of_their_axis():
    cos, sin = rotary_phases(jnp.array([[0.0, 0.5, 0.0], [0.0, 0.0, 2.0], [3.0, 0.0, 0.0]]), (2, 2, 4), 100.0)
    phases = np.array([[0.0, 0.5, 0.0, 0.0], [0.0, 0.0, 2.0, 0.2], [3.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(cos, np.cos(phases), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(phases), atol=1e-6)


def test_phases_are_float32_and_half_a_head_wide_even_for_integer_or_bfloat16_ids():
    for dtype in (jnp.int32, jnp.bfloat16, jnp.float32):
        cos, sin = rotary_phases(image_ids(4, 6).astype(dtype), AXES, THETA)
        assert cos.shape == sin.shape == (6, 8)
        assert cos.dtype == sin.dtype == jnp.float32


def test_rotation_turns_adjacent_pairs_counterclockwise():
    x = jnp.array([1.0, 0.0, 0.0, 1.0]).reshape(1, 1, 1, 4)
    turned = rotate(x, *rotary_phases(jnp.array([[0.5, 2.0]]), (2, 2), THETA))
    expected = [np.cos(0.5), np.sin(0.5), -np.sin(2.0), np.cos(2.0)]
    np.testing.assert_allclose(turned[0, 0, 0], expected, atol=1e-6)


def test_rotation_keeps_the_norm_of_every_pair_and_the_origin_in_place():
    x = _heads(0, tokens=6)
    turned = rotate(x, *rotary_phases(image_ids(4, 6) + 3.0, AXES, THETA))
    norms = lambda x: np.linalg.norm(np.asarray(x).reshape(*x.shape[:-1], -1, 2), axis=-1)
    np.testing.assert_allclose(norms(turned), norms(x), rtol=1e-5)
    assert not np.allclose(turned, x, atol=0.1)
    np.testing.assert_array_equal(_at(x, (0, 0, 0)), x)


@pytest.mark.parametrize("offset", [(0, 5, 0), (0, 0, 9), (2, 7, 3)])
def test_products_of_rotated_heads_depend_on_the_distance_of_positions_only(offset):
    q, k = _heads(0), _heads(1)
    score = lambda m, n: np.asarray(jnp.sum(_at(q, m) * _at(k, n), axis=-1))
    m, n = np.array([1, 4, 2]), np.array([0, 1, 6])
    np.testing.assert_allclose(score(m + offset, n + offset), score(m, n), rtol=1e-4, atol=1e-4)
    assert np.abs(score(m + offset, n) - score(m, n)).max() > 0.1


def test_tokens_turn_by_their_own_positions():
    x = jnp.broadcast_to(_heads(0), (2, 6, 3, sum(AXES)))
    turned = rotate(x, *rotary_phases(image_ids(4, 6), AXES, THETA))
    for token, position in enumerate(image_ids(4, 6)):
        np.testing.assert_allclose(turned[:, token], _at(x, position)[:, token], atol=1e-6)


def test_rotation_returns_the_input_dtype_and_rounds_once():
    x = _heads(0, dtype=jnp.bfloat16)
    turned = _at(x, (0, 3, 5))
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned, _at(x.astype(jnp.float32), (0, 3, 5)).astype(jnp.bfloat16))


def test_the_embedding_of_zero_is_ones_then_zeros():
    np.testing.assert_array_equal(sinusoidal_embedding(jnp.zeros(2), 8), [[1.0] * 4 + [0.0] * 4] * 2)


def test_the_embedding_is_of_a_thousand_times_the_scalar_at_frequencies_down_to_the_period():
    embedding = sinusoidal_embedding(jnp.array([0.0005, 0.25]), 4)
    for row, t in zip(embedding, (0.0005, 0.25), strict=True):
        phases = np.array([1000 * t, 10 * t])
        np.testing.assert_allclose(row, np.concatenate([np.cos(phases), np.sin(phases)]), atol=1e-4)


def test_the_embedding_is_float32_and_has_unit_pairs():
    embedding = sinusoidal_embedding(jnp.array([0.3, 0.9], jnp.bfloat16), 256)
    assert embedding.shape == (2, 256) and embedding.dtype == jnp.float32
    np.testing.assert_allclose(embedding[:, :128] ** 2 + embedding[:, 128:] ** 2, 1.0, atol=1e-5)
