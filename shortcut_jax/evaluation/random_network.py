"""A small convolutional network with fixed random weights, whose features tell sets of images apart.

Untrained features see colour, contrast and texture, not objects: a distance on them is no FID and is never called so.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from shortcut_jax.core.types import Array, Leaf

CHANNELS = 3
_SHARES = (4, 4, 2)  # of the features, for each layer: coarser ones get more


class RandomWeights(NamedTuple):
    """A 3 x 3 kernel [3, 3, in, out] and a bias for each layer."""

    kernels: tuple[Leaf, ...]
    biases: tuple[Leaf, ...]


def random_weights(seed: int, size: int) -> RandomWeights:
    """Weights for `size` features, the same on every machine: numpy draws them.

    Raises:
      ValueError: `size` is no positive multiple of 4.
    """
    if size < 4 or size % 4:
        raise ValueError(f"a random network has a multiple of 4 features, not {size}")
    rng = np.random.Generator(np.random.PCG64(seed))
    kernels, biases, channels = [], [], CHANNELS
    for share in _SHARES:
        shape = (3, 3, channels, size // share)
        kernels.append(rng.standard_normal(shape, np.float32) * np.float32((2 / (9 * channels)) ** 0.5))
        biases.append(np.float32(0.1) * rng.standard_normal(shape[-1], np.float32))
        channels = shape[-1]
    return RandomWeights(tuple(kernels), tuple(biases))


def random_features(weights: RandomWeights, x_BhwC: Array) -> Array:
    """Images [B, h, w, 3] in [-1, 1], of any size -> features [B, size]: the mean of every channel of every layer."""
    pooled = []
    for kernel, bias in zip(weights.kernels, weights.biases, strict=True):
        dimensions = ("NHWC", "HWIO", "NHWC")
        x_BhwC = jax.lax.conv_general_dilated(x_BhwC, kernel, (2, 2), "SAME", dimension_numbers=dimensions) + bias
        x_BhwC = jax.nn.leaky_relu(x_BhwC, 0.2)
        pooled.append(jnp.mean(x_BhwC, axis=(1, 2)))
    return jnp.concatenate(pooled, axis=-1)
