"""LoRA adapters for kernels with parts and heads as axes: fresh ones, their scales; `linear.Linear` applies them.

Beyond the legend in `core/types.py`: r rank, P parts.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from shortcut_jax.core.kernel_axes import kernel_axes
from shortcut_jax.core.types import Array

SHARED = {"single_blocks/attn_out": "single_blocks/mlp_out"}
"""Layers whose product with `a` is added to another's before both pass its `b`: the two read one input in diffusers."""


def adapter_shapes(shapes: Mapping[str, tuple[int, ...]], rank: int, paths: str = ".*") -> dict[str, tuple[int, ...]]:
    """Shapes of the adapters of the kernels whose layer matches a regular expression.

    Args:
      shapes: of a network's parameters, by path.
      rank: r.
      paths: matched against the whole path of a layer, such as `double_blocks/.*`. Layers that share a `b` come
        together.

    Returns:
      `layer/a`: [*in, r] and `layer/b`: [r, *out], with an axis of parts in the middle for q, k and v, and a leading
      depth axis in block stacks.
    """
    wanted = {p.removesuffix("/kernel") for p in shapes if p.endswith("/kernel")}
    wanted = {layer for layer in wanted if re.fullmatch(paths, layer)}
    for one, other in SHARED.items():
        if wanted & {one, other}:
            wanted |= {one, other} & {p.removesuffix("/kernel") for p in shapes}
    result = {}
    for layer in sorted(wanted):
        x = kernel_axes(layer, shapes[f"{layer}/kernel"])
        result[f"{layer}/a"] = (*x.depth, *x.inputs, *x.parts, rank)
        if layer not in SHARED:
            result[f"{layer}/b"] = (*x.depth, rank, *x.parts, *x.outputs)
    return result


def init_adapters(key: Array, shapes: Mapping[str, tuple[int, ...]], rank: int, paths: str = ".*") -> dict[str, Array]:
    """Adapters that change nothing yet: a is normal with standard deviation 1 / r (PEFT's "gaussian"), b is zero."""
    wanted = adapter_shapes(shapes, rank, paths)
    keys = dict(zip(wanted, jax.random.split(key, max(len(wanted), 1)), strict=False))
    make = lambda path, shape: (
        jax.random.normal(keys[path], shape) / rank if path.endswith("/a") else jnp.zeros(shape, jnp.float32)
    )
    return {path: make(path, shape) for path, shape in wanted.items()}


def scales(adapters: Any, scale: Array) -> Any:
    """The collection `lora_scale` for adapters that share one scale.

    Args:
      adapters: nested dicts, `b` and its neighbours in the dict of each layer.
      scale: a scalar, or [B, r] for rows (and ranks) with scales of their own; r may be 1.

    Returns:
      Nested dicts with the `scale` of each layer that has a `b`: [depth, B, parts, r] less the axes it does not have.
    """

    def walk(node: Any, path: str) -> Any:
        if "b" in node:
            shape = node["b"].shape
            depth = shape[:1] if "_blocks/" in path else ()
            parts = shape[len(depth) + 1 : len(depth) + 2] if path.endswith("qkv") else ()
            # Rows come before parts, ranks after them.
            row = jnp.expand_dims(scale, 1) if scale.ndim and parts else scale
            whole = (*scale.shape[:1], *parts, *scale.shape[1:])
            return {"scale": jnp.broadcast_to(row, (*depth, *whole)).astype(jnp.float32)}
        return {k: walk(v, f"{path}/{k}" if path else k) for k, v in node.items() if isinstance(v, dict)}

    return walk(adapters, "")


def concatenate(first: Any, second: Any) -> Any:
    """Two sets of adapters of the same layers as one of twice the rank: the sum of both, each with its own scale."""

    def join(path: Any, x: Array, y: Array) -> Array:
        if path[-1].key == "a":
            return jnp.concatenate([x, y], axis=-1)
        return jnp.concatenate([x, y], axis=int(path[0].key.endswith("_blocks")))

    return jax.tree_util.tree_map_with_path(join, first, second)
