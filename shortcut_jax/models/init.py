"""Weights of a Flux network from scratch, and of embeddings that a checkpoint lacks."""

import dataclasses
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from shortcut_jax.core.latents import image_ids, text_ids
from shortcut_jax.core.tree import path_name
from shortcut_jax.models.attention import unsharded
from shortcut_jax.models.flux import Flux, FluxConfig
from shortcut_jax.models.linear import no_constraint

BASE_DTYPE = jnp.bfloat16
"""What a frozen base is held in."""

FRESH_INPUTS = ("step_in/", "guidance_in/")
"""Embeddings that a network may have and its checkpoint not; their output starts at zero."""


def init_params(cfg: FluxConfig, key: jax.Array) -> Any:
    """Weights of a network from scratch; shapes of the inputs do not matter beyond their widths."""
    one = lambda *shape: jnp.zeros((1, *shape))
    optional = (one() if cfg.guidance else None, one() if cfg.step_size else None)
    inputs = (one(4, cfg.channels), one(), one(1, cfg.text_width), one(cfg.pooled_width))
    # Without constraints: a batch of one row does not divide over a mesh.
    plain = dataclasses.replace(cfg, constrain=no_constraint, per_shard=unsharded, attention="xla")
    return Flux(plain).init(key, *inputs, image_ids(4, 4), text_ids(1), *optional)["params"]


def weight_shapes(cfg: FluxConfig) -> Any:
    """The weights of a network as abstract arrays, traced once for all ways and meshes it may be computed on."""
    computing: dict[str, Any] = dict(compute_dtype="float32", matmul_dtype=None, grad_reduce_dtype="float32")
    computing |= dict(
        remat="none", scan_unroll=1, forward_mode=False, attention="xla", constrain=no_constraint, per_shard=unsharded
    )
    return _shapes(dataclasses.replace(cfg, **computing))


@lru_cache(maxsize=64)
def _shapes(cfg: FluxConfig) -> Any:
    return jax.eval_shape(partial(init_params, cfg), jax.random.key(0))


def fresh_embeddings(model: FluxConfig, names: list[str]) -> dict[str, Any]:
    """Embedders from scratch whose output is zero, so that the network is the one it was without them.

    They are the same for every run and on all hardware, bit for bit and also in bfloat16 (multiples of 2^-12, of
    standard deviation 0.018): adapters that were trained on them fit again.
    """
    shapes = weight_shapes(model)

    def draw(path: Any, shape: Any) -> jax.Array:
        if path_name(path) != "in_layer/kernel":
            return jnp.zeros(shape.shape, shape.dtype)
        return (jax.random.randint(jax.random.key(0), shape.shape, -127, 128) * 2.0**-12).astype(shape.dtype)

    return {name: jax.tree_util.tree_map_with_path(draw, shapes[name]) for name in names}
