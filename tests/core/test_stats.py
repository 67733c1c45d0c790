import numpy as np
import pytest

from shortcut_jax.core.stats import Gaussian, fit_gaussian, frechet_distance


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
