"""Fresh LoRA adapters for kernels with parts and heads as axes; `linear.Linear` applies them.

Beyond the legend in `core/types.py`: r rank, P parts.
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from shortcut_jax.core.kernels import kernel_axes
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
