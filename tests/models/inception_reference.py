"""Fixed images and weights for the full InceptionV3."""

import numpy as np

from shortcut_jax.models.inception import InceptionConfig
from tests.weights.inception_cases import random_release

FULL = InceptionConfig()


def images_and_release():
    """Images [2, 299, 299, 3], uint8, and random weights under the names of pt_inception-2015-12-05."""
    return np.random.default_rng(1).integers(0, 256, (2, 299, 299, 3), np.uint8), random_release(FULL)
