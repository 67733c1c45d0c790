import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.models.attention import BACKENDS, attend, choose_backend


def _qkv(dtype=jnp.float32, tokens=7):
    return [jax.random.normal(k, (2, tokens, 3, 8), dtype) for k in jax.random.split(jax.random.key(0), 3)]


@pytest.mark.parametrize(
    ("platform", "dtype", "head_size", "expected"),
    [
        ("gpu", "bfloat16", 128, "cudnn"),
        ("gpu", "float16", 64, "cudnn"),
        ("gpu", "float32", 128, "xla"),
        ("gpu", "bfloat16", 136, "xla"),
        ("gpu", "bfloat16", 20, "xla"),
        ("rocm", "bfloat16", 128, "xla"),
        ("tpu", "bfloat16", 128, "pallas"),
        ("tpu", "float32", 16, "pallas"),
        ("cpu", "bfloat16", 128, "xla"),
        ("metal", "float32", 64, "xla"),
    ],
)
def test_auto_takes_the_fastest_backend_that_fits(platform, dtype, head_size, expected):
    assert choose_backend("auto", platform, dtype, head_size) == expected


@pytest.mark.parametrize(
    ("backend", "platform", "dtype", "head_size"),
    [
        ("xla", "gpu", "bfloat16", 128),
        ("xla", "tpu", "float32", 16),
        ("cudnn", "gpu", "float16", 64),
        ("pallas", "tpu", "bfloat16", 64),
    ],
)
def test_a_backend_asked_for_by_name_is_kept_where_it_runs(backend, platform, dtype, head_size):
    assert choose_backend(backend, platform, dtype, head_size) == backend


@pytest.mark.parametrize(
    ("backend", "platform", "dtype", "head_size", "named"),
    [
        ("cudnn", "cpu", "bfloat16", 128, "cpu"),
        ("cudnn", "tpu", "bfloat16", 128, "tpu"),
        ("cudnn", "rocm", "bfloat16", 128, "rocm"),
        ("cudnn", "gpu", "float32", 128, "float32"),
        ("cudnn", "gpu", "bfloat16", 256, "256"),
        ("cudnn", "gpu", "bfloat16", 12, "12"),
        ("pallas", "gpu", "bfloat16", 128, "gpu"),
        ("flash", "gpu", "bfloat16", 128, "'flash'.*" + ", ".join(BACKENDS)),
    ],
)
def test_a_backend_that_cannot_run_raises_and_names_the_reason(backend, platform, dtype, head_size, named):
    with pytest.raises(ValueError, match=named):
        choose_backend(backend, platform, dtype, head_size)


def test_attention_is_the_softmax_average_of_the_values(highest_precision):
    q, k, v = (np.asarray(x, np.float64) for x in _qkv())
    scores = np.einsum("blhk,bmhk->bhlm", q, k) / np.sqrt(8)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bhlm,bmhk->blhk", weights, v)
    np.testing.assert_allclose(attend(*_qkv(), "xla"), expected, rtol=1e-5, atol=1e-5)


def test_equal_keys_give_the_plain_mean_of_the_values():
    q, k, v = _qkv()
    out = attend(q, jnp.broadcast_to(k[:, :1], k.shape), v, "xla")
    np.testing.assert_allclose(out, jnp.broadcast_to(v.mean(axis=1, keepdims=True), v.shape), atol=1e-5)


def test_permuted_tokens_give_permuted_outputs():
    q, k, v = _qkv()
    order = np.array([3, 0, 6, 1, 5, 2, 4])
    out, permuted = attend(q, k, v, "xla"), attend(q[:, order], k[:, order], v[:, order], "xla")
    np.testing.assert_allclose(permuted, out[:, order], atol=1e-5)
    assert not np.allclose(permuted, out, atol=0.1)


def test_bfloat16_attention_returns_bfloat16_with_a_float32_softmax():
    # 257 equal weights of 1/257, rounded to bfloat16 one by one, would not sum to one.
    q, k, v = _qkv(jnp.bfloat16, tokens=257)
    out = attend(jnp.zeros_like(q), k, v, "xla")
    assert out.dtype == jnp.bfloat16
    mean = np.asarray(v, np.float64).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(np.asarray(out, np.float64), np.broadcast_to(mean, out.shape), rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("tokens", [128, 160])
def test_the_tpu_kernel_equals_xla_also_where_tokens_are_padded(tokens):
    from jax.experimental.pallas import tpu

    q, k, v = (jax.random.normal(key, (1, tokens, 2, 128)) for key in jax.random.split(jax.random.key(0), 3))
    expected = attend(q, k, v, "xla")
    calls = []

    def per_shard(kernel):
        calls.append(kernel)
        return kernel

    with tpu.force_tpu_interpret_mode():
        actual = jax.jit(lambda q, k, v: attend(q, k, v, "pallas", per_shard))(q, k, v)
    np.testing.assert_allclose(actual, expected, atol=2e-6)
    assert len(calls) == 1
