"""Statistics of sets of images, in float64 on the host."""

from typing import NamedTuple

import numpy as np


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
