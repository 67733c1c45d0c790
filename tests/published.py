"""What pytorch-fid, clean-fid and torch-fidelity gave for fixed inputs; `benchmarks/published_metrics.py` writes it."""

from pathlib import Path

import numpy as np

PATH = Path(__file__).parent / "fixtures" / "published.npz"

SIZES = [(8, 8), (64, 48), (299, 299), (700, 333)]
COUNTS = [20, 400]
"""Of features: fewer samples than features, and more."""
KID = {"kid_subsets": 12, "kid_subset_size": 90}


def given(name):
    """One of the arrays."""
    with np.load(PATH) as stored:
        return stored[name]


def images(height, width, channels=3, count=2):
    return np.random.default_rng(height).integers(0, 256, (count, height, width, channels), np.uint8)


def thinned(images_BhwC):
    """Every thirteenth pixel of 299, the first and the last among them."""
    places = np.linspace(0, 298, 24).round().astype(int)
    return images_BhwC[:, places][:, :, places]


def features(seed, count=400, size=48, shift=0.0):
    """Correlated features of unequal scales, all positive as pooled ones are."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((size, size)) / size**0.5
    return np.abs(rng.standard_normal((count, size)) @ mix + shift).astype(np.float32)


def pair(count):
    return features(0, count), features(1, count, shift=0.3)


def kid_pair():
    return features(4, 300), features(5, 350, shift=0.2)
