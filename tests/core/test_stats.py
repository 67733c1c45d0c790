import numpy as np
import pytest

from shortcut_jax.core.stats import (
    Gaussian,
    add_moments,
    add_to_reservoir,
    clip_score,
    fit_gaussian,
    frechet_distance,
    frechet_error,
    gaussian_of,
    kernel_distance,
    merge_moments,
    merge_reservoirs,
    no_moments,
    no_reservoir,
    precision_recall,
)
from tests import published
from tests.published import features as _features


def _random_gaussian(seed, size=5):
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((size, size))
    return Gaussian(rng.standard_normal(size), root @ root.T)


def test_fitting_gives_the_sample_mean_and_unbiased_covariance():
    gaussian = fit_gaussian(np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]]))
    np.testing.assert_allclose(gaussian.mean, [2.0, 2.0])
    np.testing.assert_allclose(gaussian.covariance, [[4.0, 3.0], [3.0, 3.0]])


def test_fitting_flattens_images_and_computes_in_float64():
    images = np.random.default_rng(0).integers(0, 255, (10, 2, 3, 1)).astype(np.uint8)
    gaussian, flat = fit_gaussian(images), fit_gaussian(images.reshape(10, 6))
    assert gaussian.mean.shape == (6,) and gaussian.covariance.shape == (6, 6)
    assert gaussian.mean.dtype == gaussian.covariance.dtype == np.float64
    np.testing.assert_array_equal(gaussian.covariance, flat.covariance)
    shifted = fit_gaussian(np.float32(images) + np.float32(4096))
    np.testing.assert_allclose(shifted.covariance, gaussian.covariance, rtol=1e-9)


def test_identical_gaussians_have_no_distance():
    a = _random_gaussian(0)
    assert abs(frechet_distance(a, a)) < 1e-9


def test_diagonal_gaussians_have_the_distance_of_their_deviations():
    a = Gaussian(np.array([0.0, 1.0, 2.0]), np.diag([1.0, 4.0, 9.0]))
    b = Gaussian(np.array([1.0, 1.0, 0.0]), np.diag([16.0, 4.0, 1.0]))
    assert np.isclose(frechet_distance(a, b), (1 + 0 + 4) + (3**2 + 0 + 2**2))


def test_covariances_that_do_not_commute_have_the_closed_form_of_two_dimensions():
    a, b = _random_gaussian(1, 2), _random_gaussian(2, 2)
    product = a.covariance @ b.covariance
    trace_of_root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance) - 2 * trace_of_root
    assert np.isclose(frechet_distance(a, b), expected)


def test_distance_is_symmetric_and_positive():
    a, b = _random_gaussian(3), _random_gaussian(4)
    assert np.isclose(frechet_distance(a, b), frechet_distance(b, a))
    assert frechet_distance(a, b) > ((a.mean - b.mean) ** 2).sum()


def test_distance_does_not_depend_on_the_basis():
    a, b = _random_gaussian(5), _random_gaussian(6)
    q, _ = np.linalg.qr(np.random.default_rng(7).standard_normal((5, 5)))
    turn = lambda g: Gaussian(q @ g.mean, q @ g.covariance @ q.T)
    assert np.isclose(frechet_distance(turn(a), turn(b)), frechet_distance(a, b))


@pytest.mark.parametrize("angle", [0.0, 0.4, np.pi / 2])
def test_covariances_of_rank_one_are_exact(angle):
    u, w = np.array([2.0, 0.0]), 3.0 * np.array([np.cos(angle), np.sin(angle)])
    a, b = Gaussian(np.zeros(2), np.outer(u, u)), Gaussian(np.zeros(2), np.outer(w, w))
    assert np.isclose(frechet_distance(a, b), 4 + 9 - 2 * 6 * np.cos(angle), atol=1e-6)


def test_fewer_samples_than_features_is_fine():
    features = np.random.default_rng(8).standard_normal((4, 32))
    a = fit_gaussian(features)
    assert abs(frechet_distance(a, a)) < 1e-5
    assert np.isclose(frechet_distance(a, fit_gaussian(features + 0.5)), 32 * 0.25, atol=1e-5)


@pytest.mark.parametrize("count", published.COUNTS)
def test_frechet_distance_equals_that_of_pytorch_fid(count):
    a, b = (fit_gaussian(x) for x in published.pair(count))
    expected = published.given(f"frechet/{count}")
    assert expected > 0.1 and abs(frechet_distance(a, b) - expected) < 1e-3


@pytest.mark.parametrize("shift, scale", [(0.0, 1.0), (1.0, 1.0), (0.3, 1.5)])
def test_the_error_of_a_distance_is_its_deviation_over_samples(shift, scale):
    rng = np.random.default_rng(0)
    mix, real = np.eye(6) + 0.1 * rng.normal(size=(6, 6)), Gaussian(np.zeros(6), np.eye(6))
    sets = [(rng.normal(size=(400, 6)) * scale + shift) @ mix for _ in range(100)]
    deviation = np.std([frechet_distance(fit_gaussian(x_SF), real) for x_SF in sets])
    assert np.mean([frechet_error(x_SF, real) for x_SF in sets]) == pytest.approx(deviation, rel=0.2)


def test_too_few_samples_for_a_covariance_have_no_error():
    assert frechet_error(np.random.default_rng(0).normal(size=(6, 6)), Gaussian(np.zeros(6), np.eye(6))) is None


def test_moments_in_a_stream_are_those_of_all_samples_however_they_are_split():
    x = _features(2)
    whole = fit_gaussian(x)
    one = add_moments(no_moments(48), x)
    vae_codec = [add_moments(no_moments(48), part) for part in (x[:7], x[7:])]
    stream = no_moments(48)
    for part in np.array_split(x, 23):
        stream = add_moments(stream, part)
    stream = merge_moments(no_moments(48), add_moments(stream, x[:0]))
    for moments in (one, merge_moments(*vae_codec), merge_moments(*vae_codec[::-1]), stream):
        assert moments.count == 400 and moments.outer.dtype == np.float64
        assert moments.outer.nbytes + moments.sum.nbytes == 8 * 48 * 49  # whatever the number of samples
        np.testing.assert_allclose(gaussian_of(moments).mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(gaussian_of(moments).covariance, whole.covariance, rtol=1e-9, atol=1e-12)


def test_moments_keep_their_digits_under_a_large_common_mean():
    """Sums of squares would hold 1e8 beside a variance of 1: nothing of it is left in float32, half in float64."""
    x = np.random.default_rng(3).standard_normal((5000, 4))
    far = 1e4 * 2.0 ** np.arange(4, 8) + x
    moments = no_moments(4)
    for part in np.array_split(far, 50):
        moments = add_moments(moments, part)
    np.testing.assert_allclose(gaussian_of(moments).covariance, np.cov(x, rowvar=False), atol=1e-9)


def test_a_covariance_needs_two_samples():
    with pytest.raises(ValueError, match="at least 2 samples, but there are 1"):
        gaussian_of(add_moments(no_moments(3), np.ones((1, 3))))


def test_kernel_distance_equals_that_of_torch_fidelity():
    (a, b), expected = published.kid_pair(), published.given("kid")
    actual = kernel_distance(a, b, subsets=12, subset_size=90)
    assert expected[0] > 1e-2
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    assert kernel_distance(a, b, 12, 90) == actual != kernel_distance(a, b, 12, 90, seed=1)


def test_kernel_distance_is_the_mean_over_pairs_of_different_samples():
    x, y = np.float32([[0, 1], [2, 0], [1, 1]]), np.float32([[1, 0], [0, 0], [3, 1]])
    kernel = lambda a, b: (float(a @ b) / 2 + 1) ** 3
    pairs = [(i, j) for i in range(3) for j in range(3)]
    own = sum(kernel(z[i], z[j]) for z in (x, y) for i, j in pairs if i != j) / 6
    expected = own - 2 * sum(kernel(x[i], y[j]) for i, j in pairs) / 9
    np.testing.assert_allclose(kernel_distance(x, y, subsets=4, subset_size=3), [expected, 0.0], atol=1e-12)


def test_kernel_distance_refuses_subsets_larger_than_a_set():
    with pytest.raises(ValueError, match="subsets of 1000 samples cannot be drawn from 400 and 30: take more samples"):
        kernel_distance(_features(0), _features(1, 30))


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("rows", [1000, 37])  # at once
def test_precision_and_recall_equal_those_of_prdc(k, rows, monkeypatch, capfd):
    from prdc import compute_prdc

    from shortcut_jax.core import stats

    monkeypatch.setattr(stats, "_ROWS_AT_ONCE", rows)
    real, fake = _features(6, 200, 12), _features(7, 170, 12, shift=0.4)
    expected = compute_prdc(real, fake, nearest_k=k)
    actual = precision_recall(real + np.float32(64), fake + np.float32(64), k)
    assert 0.2 < expected["precision"] < 0.98 and 0.2 < expected["recall"] < 0.98
    np.testing.assert_allclose(actual, [expected[name] for name in actual._fields], rtol=1e-12)


def test_precision_and_recall_of_a_set_and_itself_are_one_and_few_samples_are_refused():
    x = _features(8, 60)
    precision, recall, _, coverage = precision_recall(x, x)
    assert precision == recall == coverage == 1.0
    assert precision_recall(x, x + 100)[:2] == (0.0, 0.0)
    with pytest.raises(ValueError, match="60 real and 3 fake samples are too few for 3 neighbours"):
        precision_recall(x, x[:3])


def _reservoir(parts, x, seed=5, capacity=40):
    reservoir = no_reservoir(capacity, x.shape[1])
    for index in parts:
        reservoir = add_to_reservoir(reservoir, index, x[index], seed)
    return reservoir


def _equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_reservoir_depends_on_nothing_but_seed_and_indices():
    x = _features(9, 300, 4)
    order = np.random.default_rng(0).permutation(300)
    whole = _reservoir([np.arange(300)], x)
    assert whole.features_SF.shape == (40, 4) and len(set(whole.index_S)) == 40
    np.testing.assert_array_equal(whole.features_SF, x[whole.index_S])
    assert _equal(whole, _reservoir(np.array_split(order, 17), x))
    processes = [_reservoir(np.array_split(part, 3), x) for part in (order[:90], order[90:110], order[110:])]
    assert _equal(whole, merge_reservoirs(merge_reservoirs(processes[2], processes[0]), processes[1]))
    assert _equal(whole, _reservoir([order, order[:50]], x))  # the same samples again after a restart
    other = _reservoir([np.arange(300)], x, seed=6)
    assert set(other.index_S) != set(whole.index_S)


def test_a_reservoir_keeps_all_of_few_samples_and_every_sample_alike_of_many():
    x = np.zeros((30, 1), np.float32)
    assert sorted(_reservoir([np.arange(30)], x).index_S) == list(range(30))
    x = np.zeros((20_000, 1), np.float32)
    kept = _reservoir(np.array_split(np.arange(20_000), 100), x, capacity=4000).index_S
    assert len(kept) == 4000
    np.testing.assert_allclose(np.histogram(kept, 10, (0, 20_000))[0], 400, atol=80)  # 4.5 standard deviations
    assert abs(np.mean(kept % 2) - 0.5) < 0.04


def test_clip_score_is_a_hundred_times_the_cosine_or_zero():
    images = np.array([[1.0, 0.0], [3.0, 4.0], [1.0, 0.0]], np.float32)
    texts = np.array([[2.0, 0.0], [0.0, 7.0], [-1.0, 0.0]], np.float32)
    np.testing.assert_allclose(clip_score(images, texts), [100.0, 80.0, 0.0])
