"""2x2 patches and their position ids, as Flux packs them."""

import chex
import jax.numpy as jnp
import numpy as np

from shortcut_jax.core.types import Array

PATCH = 2


def patchify(latents_BhwC: Array) -> Array:
    """[B, h, w, c] -> [B, h/2 * w/2, 4 c]: tokens in raster order, packed channels ordered (c, row, column) as Flux."""
    chex.assert_rank(latents_BhwC, 4)
    b, h, w, c = latents_BhwC.shape
    x = latents_BhwC.reshape(b, h // PATCH, PATCH, w // PATCH, PATCH, c)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, (h // PATCH) * (w // PATCH), c * PATCH * PATCH)


def unpatchify(x_BNC: Array, height: int, width: int) -> Array:
    """The inverse of `patchify` for latents of `height` x `width`."""
    chex.assert_shape(x_BNC, (None, height // PATCH * (width // PATCH), None))
    b, _, packed = x_BNC.shape
    x = x_BNC.reshape(b, height // PATCH, width // PATCH, packed // PATCH**2, PATCH, PATCH)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(b, height, width, packed // PATCH**2)


def image_ids(height: int, width: int) -> Array:
    """Position ids (0, row, column) of the patches of latents of `height` x `width`, shape [N, 3]."""
    rows, columns = height // PATCH, width // PATCH
    ids = np.zeros((rows, columns, 3), np.float32)
    ids[..., 1] = np.arange(rows)[:, None]
    ids[..., 2] = np.arange(columns)[None, :]
    return jnp.asarray(ids.reshape(-1, 3))


def text_ids(num_tokens: int) -> Array:
    """Flux gives every text token the position (0, 0, 0), shape [M, 3]."""
    return jnp.zeros((num_tokens, 3), jnp.float32)
