"""LoRA factors of one strength at another."""

from collections.abc import Mapping

import numpy as np


def rescaled(arrays: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray], scale: float) -> dict[str, np.ndarray]:
    """Adapters by path with one scale for all and, through `b`, the same function: unchanged where the scale is."""
    result = {}
    for path, value in arrays.items():
        result[path] = np.asarray(value, np.float32)
        layer, _, half = path.rpartition("/")
        if half == "b" and np.any(own[layer] != np.float32(scale)):
            ratio = (own[layer] / scale).astype(np.float32)
            depth = int("_blocks/" in layer)
            # [depth, parts] -> [depth, 1 (rank), parts, 1 ...]
            ratio = np.expand_dims(ratio, depth)
            result[path] = result[path] * ratio.reshape(ratio.shape + (1,) * (value.ndim - ratio.ndim))
    return result
