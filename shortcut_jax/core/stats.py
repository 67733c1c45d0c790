"""Statistics of sets of images, in float64 on the host.

Beyond the legend in `core/types.py`: S samples, F features of a sample.
"""

from typing import NamedTuple

import numpy as np

_ROWS_AT_ONCE = 1000
"""Of a matrix of distances, so that its memory does not grow with the square of the samples."""


class Gaussian(NamedTuple):
    """Mean [F] and covariance [F, F] of feature vectors."""

    mean: np.ndarray
    covariance: np.ndarray


def fit_gaussian(features: np.ndarray) -> Gaussian:
    """Fits a Gaussian to features [S, ...] (flattened to [S, F]), S at least 2."""
    flat = features.reshape(len(features), -1).astype(np.float64)
    return Gaussian(flat.mean(axis=0), np.cov(flat, rowvar=False))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance of two Gaussians: |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)).

    The trace of the root comes from the symmetric S_a^(1/2) S_b S_a^(1/2), which stays exact for singular covariances.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    cross = np.clip(np.linalg.eigvalsh(root @ b.covariance @ root), 0.0, None)
    mean = np.sum((a.mean - b.mean) ** 2)
    return float(mean + np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * np.sqrt(cross).sum())


def frechet_error(samples_SF: np.ndarray, real: Gaussian) -> float | None:
    """The standard error of the distance of these samples' Gaussian to another one, by the delta method.

    To first order a sample x moves the distance by 2 (m - m_r) d + d (1 - T) d over S, where d = x - m and
    T = R (R S R)^(-1/2) R with R = S_r^(1/2): the map that carries the samples' Gaussian to the other one. None for too
    few samples for a covariance of full rank, where the distance is mostly bias.
    """
    count, size = samples_SF.shape
    if count <= size:
        return None
    own = fit_gaussian(samples_SF)
    values, vectors = np.linalg.eigh(real.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    values, vectors = np.linalg.eigh(root @ own.covariance @ root)
    inverse = np.where(values > 1e-12 * values.max(initial=0.0), 1.0 / np.sqrt(np.clip(values, 1e-300, None)), 0.0)
    carry = root @ (vectors * inverse) @ vectors.T @ root
    d_SF = np.asarray(samples_SF, np.float64) - own.mean
    moved_S = 2.0 * d_SF @ (own.mean - real.mean) + (d_SF**2).sum(axis=1) - ((d_SF @ carry) * d_SF).sum(axis=1)
    return float(moved_S.std() / np.sqrt(count))


class Moments(NamedTuple):
    """What a Gaussian is fitted from, gathered in a stream: its size does not depend on the number of samples.

    Attributes:
      count: S.
      sum: [F], of the features.
      outer: [F, F], sum over samples of (x - mean) (x - mean)^T. Products of deviations, not of features: their
        difference from the product of the means would lose every digit where the mean is large.
    """

    count: int  # type: ignore[assignment]  # also the name of a method of tuples
    sum: np.ndarray
    outer: np.ndarray


def no_moments(size: int) -> Moments:
    """The moments of no samples of `size` features."""
    return Moments(0, np.zeros(size), np.zeros((size, size)))


def add_moments(moments: Moments, features_SF: np.ndarray) -> Moments:
    """The moments of further samples too, any number of them."""
    flat = np.asarray(features_SF, np.float64)
    if not len(flat):
        return moments
    centred = flat - flat.mean(axis=0)
    return merge_moments(moments, Moments(len(flat), flat.sum(axis=0), centred.T @ centred))


def merge_moments(a: Moments, b: Moments) -> Moments:
    """The moments of two sets of samples together (Chan et al. 1979): processes and batches merge in any order."""
    if not a.count or not b.count:
        return a if a.count else b
    apart = b.sum / b.count - a.sum / a.count
    count = a.count + b.count
    return Moments(count, a.sum + b.sum, a.outer + b.outer + np.outer(apart, apart) * (a.count * b.count / count))


def gaussian_of(moments: Moments) -> Gaussian:
    """The Gaussian with the mean and the unbiased covariance of the samples.

    Raises:
      ValueError: there are fewer than two samples.
    """
    if moments.count < 2:
        raise ValueError(f"a covariance needs at least 2 samples, but there are {moments.count}")
    return Gaussian(moments.sum / moments.count, moments.outer / (moments.count - 1))


class KernelDistance(NamedTuple):
    """Mean and standard deviation over subsets of the squared maximum mean discrepancy."""

    mean: float
    std: float


def kernel_distance(
    a_SF: np.ndarray, b_SF: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> KernelDistance:
    """The unbiased kernel distance with the kernel (x y / F + 1)^3 (Binkowski et al. 2018; KID on Inception features).

    Subsets are drawn as torch-fidelity does, whose default the seed is.

    Args:
      a_SF: features of one set.
      b_SF: features of the other; the numbers of samples may differ.
      subsets: pairs of subsets that are drawn.
      subset_size: samples of each, at least 2.
      seed: of the draws.

    Raises:
      ValueError: a set has fewer samples than a subset.
    """
    if not 2 <= subset_size <= min(len(a_SF), len(b_SF)):
        raise ValueError(
            f"subsets of {subset_size} samples cannot be drawn from {len(a_SF)} and {len(b_SF)}: "
            f"take more samples, or subsets of 2 to {min(len(a_SF), len(b_SF))}"
        )
    rng = np.random.RandomState(seed)
    # Which samples are in which subset: sums over subsets are then products, and each kernel is computed once.
    a_in, b_in = np.zeros((len(a_SF), subsets)), np.zeros((len(b_SF), subsets))
    for i in range(subsets):
        for chosen in (a_in, b_in):
            chosen[rng.choice(len(chosen), subset_size, replace=False), i] = 1.0
    own = _kernel_sums(a_SF, a_SF, a_in, a_in) + _kernel_sums(b_SF, b_SF, b_in, b_in)
    for z_SF, chosen in ((a_SF, a_in), (b_SF, b_in)):
        own -= ((np.square(z_SF, dtype=np.float64).mean(axis=1) + 1.0) ** 3) @ chosen
    values = own / (subset_size * (subset_size - 1))
    values -= 2.0 * _kernel_sums(a_SF, b_SF, a_in, b_in) / subset_size**2
    return KernelDistance(float(values.mean()), float(values.std()))


def _kernel_sums(x_SF: np.ndarray, y_SF: np.ndarray, x_in: np.ndarray, y_in: np.ndarray) -> np.ndarray:
    """The sum of the kernel over all pairs of each pair of subsets, some rows at a time."""
    y_FS = y_SF.T.astype(np.float64)
    sums = np.zeros(x_in.shape[1])
    for rows in _row_blocks(len(x_SF)):
        kernel = x_SF[rows].astype(np.float64) @ y_FS / len(y_FS) + 1.0
        kernel *= kernel * kernel
        sums += (x_in[rows] * (kernel @ y_in)).sum(axis=0)
    return sums


class Manifolds(NamedTuple):
    """How far two sets of samples cover each other; a manifold is a ball around each sample, to its k-th neighbour.

    Attributes:
      precision: share of the fake samples inside the real manifold (Kynkaanniemi et al. 2019).
      recall: share of the real samples inside the fake manifold.
      density: mean number of real balls that hold a fake sample, over k (Naeem et al. 2020).
      coverage: share of the real balls that hold a fake sample.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(real_SF: np.ndarray, fake_SF: np.ndarray, k: int = 3) -> Manifolds:
    """Compares the manifolds of real and of fake features, some rows of distances at a time.

    Raises:
      ValueError: a set has not more than k samples.
    """
    if min(len(real_SF), len(fake_SF)) <= k:
        raise ValueError(f"{len(real_SF)} real and {len(fake_SF)} fake samples are too few for {k} neighbours of each")
    # Distances do not change where both move, and lose fewer digits near the origin.
    centre = real_SF.mean(axis=0, dtype=np.float64)
    real_SF, fake_SF = real_SF - centre, fake_SF - centre
    real_radius_S, fake_radius_S = _radii(real_SF, k), _radii(fake_SF, k)
    held = np.zeros(len(fake_SF), np.int64)
    recalled, covered = 0, 0
    for rows in _row_blocks(len(real_SF)):
        apart = _squared_distances(real_SF[rows], fake_SF)
        inside = apart < real_radius_S[rows, None]
        held += inside.sum(axis=0)
        covered += int(inside.any(axis=1).sum())
        recalled += int((apart < fake_radius_S).any(axis=1).sum())
    return Manifolds(float((held > 0).mean()), recalled / len(real_SF), float(held.mean() / k), covered / len(real_SF))


def _row_blocks(count: int) -> list[slice]:
    return [slice(i, i + _ROWS_AT_ONCE) for i in range(0, count, _ROWS_AT_ONCE)]


def _squared_distances(x_SF: np.ndarray, y_SF: np.ndarray) -> np.ndarray:
    squares = (x_SF**2).sum(axis=1)[:, None] + (y_SF**2).sum(axis=1)
    return np.maximum(squares - 2.0 * (x_SF @ y_SF.T), 0.0)


def _radii(x_SF: np.ndarray, k: int) -> np.ndarray:
    """The squared distance of each sample to its k-th neighbour; the nearest of all is itself."""
    blocks = _row_blocks(len(x_SF))
    return np.concatenate([np.partition(_squared_distances(x_SF[rows], x_SF), k, axis=1)[:, k] for rows in blocks])


class Reservoir(NamedTuple):
    """A fixed choice of samples: those whose hash of their global index is smallest, by that hash.

    Which ones they are depends on the seed and on the indices seen, but not on their order, nor on the batches or
    processes that they came in; a sample that comes twice counts once.

    Attributes:
      capacity: the most that are kept.
      rank_S: the hashes, ascending, uint64.
      index_S: the global indices, int64.
      features_SF: float32.
    """

    capacity: int
    rank_S: np.ndarray
    index_S: np.ndarray
    features_SF: np.ndarray


def no_reservoir(capacity: int, size: int) -> Reservoir:
    """An empty reservoir for samples of `size` features."""
    return Reservoir(capacity, np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros((0, size), np.float32))


def add_to_reservoir(reservoir: Reservoir, index_S: np.ndarray, features_SF: np.ndarray, seed: int) -> Reservoir:
    """Offers samples by their global indices; one seed for the whole set."""
    index_S = np.asarray(index_S, np.int64)
    rank_S = _ranks(index_S, seed)
    if len(reservoir.rank_S) == reservoir.capacity:  # most of a long stream is passed over without a copy
        chosen = rank_S < reservoir.rank_S[-1]
        index_S, rank_S, features_SF = index_S[chosen], rank_S[chosen], features_SF[chosen]
    if not len(index_S):
        return reservoir
    return merge_reservoirs(reservoir, Reservoir(reservoir.capacity, rank_S, index_S, np.asarray(features_SF, "f4")))


def merge_reservoirs(a: Reservoir, b: Reservoir) -> Reservoir:
    """The reservoir of the samples of two, of the same seed."""
    rank_S = np.concatenate([a.rank_S, b.rank_S])
    _, first = np.unique(rank_S, return_index=True)
    kept = first[: a.capacity]
    index_S = np.concatenate([a.index_S, b.index_S])[kept]
    return Reservoir(a.capacity, rank_S[kept], index_S, np.concatenate([a.features_SF, b.features_SF])[kept])


def _ranks(index_S: np.ndarray, seed: int) -> np.ndarray:
    """SplitMix64 (Steele et al. 2014) of each index, from a start that the seed sets: one to one, so without ties."""
    start = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    z = index_S.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def clip_score(images_BE: np.ndarray, texts_BE: np.ndarray) -> np.ndarray:
    """100 max(cos, 0) of each image and its text, [B]; E joint width (Hessel et al. 2021, scaled as torchmetrics)."""
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (np.asarray(e, "f8") for e in (images_BE, texts_BE)))
    return 100.0 * np.maximum((x * y).sum(axis=1), 0.0)
