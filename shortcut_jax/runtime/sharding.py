"""Meshes and shardings: two tables, one for parameters by path and one for activations by logical axis."""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from shortcut_jax.core.tree import first_match, flat_paths, path_name
from shortcut_jax.core.types import Array
from shortcut_jax.models.attention import PerShard
from shortcut_jax.models.linear import SHARDS, Constrain, Names
from shortcut_jax.runtime.placement import place_devices

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "shard": ("fsdp",),
    "shard_all": ("fsdp", "tensor"),
}
"""Logical axis -> mesh axes, for activations and for kernels inside a step."""

P = PartitionSpec
ALL = ("fsdp", "tensor")
"""What splits a kernel without heads or MLP width: `tensor` too, though each device then uses it whole."""

PARAM_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    # Blocks, with their leading depth axis: `tensor` splits heads and the MLP width, and with `fsdp` what has neither.
    (r".*_blocks/.*qkv/kernel", P(None, "fsdp", None, "tensor", None)),
    (r".*_blocks/.*qkv/bias", P(None, None, "tensor", None)),
    (r".*_blocks/.*attn_out/kernel", P(None, "tensor", None, "fsdp")),
    (r".*_blocks/.*mlp_(in|gate)/kernel", P(None, "fsdp", "tensor")),
    (r".*_blocks/.*mlp_in/bias", P(None, "tensor")),
    (r".*_blocks/.*mlp_out/kernel", P(None, "tensor", "fsdp")),
    (r".*_blocks/.*modulation/linear/kernel", P(None, ALL, None, None)),
    # Adapters: the axes that they share with their kernel are split like it, the rank never.
    (r".*_blocks/.*qkv/a", P(None, "fsdp", None, None)),
    (r".*_blocks/.*qkv/b", P(None, None, None, "tensor", None)),
    (r".*_blocks/.*(attn|mlp)_out/a", P(None, "tensor")),
    (r".*_blocks/.*(attn|mlp)_out/b", P(None, None, "fsdp")),
    (r".*_blocks/.*mlp_in/a", P(None, "fsdp", None)),
    (r".*_blocks/.*mlp_in/b", P(None, None, "tensor")),
    (r".*_blocks/.*modulation/linear/a", P(None, ALL, None)),
    (r".*/a|.*/b", P()),
    # The autoencoder is small: its convolutions are whole.
    (r"(.*/)?(encoder|decoder)/.*kernel", P()),
    # So are those of the networks that judge images.
    (r"(conv2d|mixed)_.*/(kernel|mean|variance)|fc/kernel", P()),
    (r"image/(patch_embedding/kernel|class_embedding)", P()),
    (r"(image|text)_projection/kernel", P("fsdp", None)),
    # Ends.
    (r"(.*/)?token_embedding", P(None, "fsdp")),
    (r"(.*/)?position_(bias|embedding)", P()),
    (r".*final_modulation/linear/kernel", P(ALL, None, None)),
    (r".*final_linear/kernel", P("fsdp", None)),
    (r".*_in/kernel", P(None, "fsdp")),
    (r".*(time|guidance|pooled|step)_in/(in|out)_layer/kernel", P(None, "fsdp")),
    # Vectors are small and needed everywhere.
    (r".*/(bias|scale)", P()),
)
"""Ordered (path regex, spec): the first match wins; a parameter that matches none is an error."""

STATE_RULES = (
    *PARAM_RULES,
    (r"(.*/)?(step|count|skipped|skipped_total)|(memory|spikes)/.*|frozen/(scale|unconditional/.*)", P()),
)
"""The same for a whole train state: moments and EMAs end in the path of their parameter."""


@dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis.

    Attributes:
      data: copies of the weights, each with its part of the batch.
      fsdp: shards of weights, moments and EMAs, each with its part of the batch.
      tensor: shards of heads and MLP width.
    """

    data: int
    fsdp: int
    tensor: int

    @property
    def devices(self) -> int:
        """Devices in all."""
        return self.data * self.fsdp * self.tensor

    @property
    def batch_shards(self) -> int:
        """Parts that the global batch is split into."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        return f"data {self.data} x fsdp {self.fsdp} x tensor {self.tensor}"


def batch_shards(mesh: Mesh) -> int:
    """Parts that the global batch is split into on a mesh of `make_mesh`."""
    return MeshShape(**mesh.shape).batch_shards


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the given devices (all, by default), with axes that the partitioner propagates through.

    `data` crosses nodes before `fsdp` does, and `fsdp` before `tensor`: see `place_devices`. JAX would make `Explicit`
    axes by default, which refuse the sharding constraints used here.
    """
    sizes = (shape.data, shape.fsdp, shape.tensor)
    placed = place_devices(sizes, jax.devices() if devices is None else devices)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def fit_spec(mesh: Mesh, spec: Iterable[Any], shape: Sequence[int]) -> PartitionSpec:
    """A spec without axes of size 1, and of those of each dimension only as many as divide it, from the first on."""
    fitted = []
    for size, entry in zip_longest(shape, spec):
        axes = tuple(a for a in _axes(entry) if mesh.shape[a] > 1)
        while axes and size % math.prod(mesh.shape[a] for a in axes):
            axes = axes[:-1]
        fitted.append((axes[0] if len(axes) == 1 else axes) if axes else None)
    return P(*fitted)


def _axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


@functools.cache
def make_constrain(mesh: Mesh, min_shard: int = 0) -> Constrain:
    """The function by which models reach the activation table: constrain(x, logical names) -> x.

    A name of None says that the axis is whole on every device. A kernel that `leaf_spec` does not split over `fsdp`,
    for it has fewer than `min_shard` values, is not split inside a step either.
    """

    def constrain(x: Array, names: Names) -> Array:
        whole = (None, *SHARDS) if x.size < min_shard else (None,)
        spec = [None if name in whole else LOGICAL_AXES[str(name)] for name in names]
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fit_spec(mesh, spec, x.shape)))

    return constrain


@functools.cache
def make_per_shard(mesh: Mesh) -> PerShard:
    """Wraps a kernel of q, k, v [B, L, H, K] so that each device runs it on its own rows and heads."""
    spec = P(BATCH_AXES, None, "tensor", None)
    return lambda kernel: jax.shard_map(kernel, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)


def leaf_spec(mesh: Mesh, path: str, shape: Sequence[int], min_shard: int = 0) -> tuple[PartitionSpec, str]:
    """The spec of one leaf, and why it is less split than the mesh and its rule allow (empty where it is not).

    Raises KeyError for a leaf without a rule.

    Args:
      mesh: that the leaf is placed on.
      path: of the leaf.
      shape: of the leaf.
      min_shard: fewer values than these in a layer (the slice of one block, where blocks are stacked) are not split
        over `fsdp`: gathering them costs a message in each step and saves next to no memory.
    """
    rule: PartitionSpec = first_match(STATE_RULES, path)
    count = math.prod(shape[1:] if "_blocks/" in path else shape)
    small = count < min_shard and any("fsdp" in _axes(entry) and mesh.shape["fsdp"] > 1 for entry in rule)
    spec = fit_spec(mesh, (None if small and "fsdp" in _axes(entry) else entry for entry in rule), shape)
    reasons = [f"not over fsdp: {count:,} values, fewer than mesh.min_shard {min_shard:,}"] if small else []
    for size, wanted, got in zip(shape, rule, spec, strict=False):
        left = [axis for axis in _axes(wanted) if axis not in _axes(got) and mesh.shape[axis] > 1]
        if left and not (small and "fsdp" in _axes(wanted)):
            factor = math.prod(mesh.shape[axis] for axis in (*_axes(got), left[0]))
            reasons.append(f"not over {left[0]}: {size} is not a multiple of {factor}")
    if not any(spec) and not reasons:
        axes = ", ".join(axis for entry in rule for axis in _axes(entry))
        reasons = [f"whole: the mesh has one device along {axes}" if axes else "whole by its rule"]
    return spec, "; ".join(reasons)


def tree_shardings(mesh: Mesh, tree: Any, min_shard: int = 0) -> Any:
    """A NamedSharding for each leaf of a parameter tree or train state, by `STATE_RULES` and `leaf_spec`.

    A dimension that its mesh axis does not divide stays whole. Raises KeyError for a leaf without a rule.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, leaf_spec(mesh, path_name(path), leaf.shape, min_shard)[0])

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def own_device(mesh: Mesh) -> Any:
    """A device of a mesh, one of this process where it has any (of those that are only compiled for it has none)."""
    return next((d for d in mesh.devices.flat if d.process_index == jax.process_index()), mesh.devices.flat[0])


def local_bytes(tree: Any) -> int:
    """Bytes of one device's shards of arrays, or of shapes with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def describe_shardings(tree: Any, min_shard: int = 0) -> str:
    """The resolved table of abstract arrays, a line each: path, shape, spec, and why it is whole where it is."""
    lines = []
    for path, leaf in flat_paths(tree).items():
        why = leaf_spec(leaf.sharding.mesh, path, leaf.shape, min_shard)[1]
        lines.append(f"{path}  {tuple(leaf.shape)}  {tuple(leaf.sharding.spec)}{f'  {why}' if why else ''}")
    return "\n".join(lines)


def summarise_shardings(tree: Any) -> str:
    """What of a tree of abstract arrays is split, and what share of its values every device holds whole."""
    leaves = jax.tree.leaves(tree)
    whole = [leaf for leaf in leaves if not any(leaf.sharding.spec)]
    share = sum(leaf.size for leaf in whole) / sum(leaf.size for leaf in leaves)
    return f"{len(leaves) - len(whole)} of {len(leaves)} arrays are split, {share:.2%} of the values are whole"


def process_rows(sharding: NamedSharding, num_rows: int) -> np.ndarray:
    """The global rows that this process's devices hold, ascending.

    Processes that hold the same rows (where `tensor` spans hosts) get the same answer, so they read the same samples.
    """
    rows: set[int] = set()
    for index in sharding.addressable_devices_indices_map((num_rows,)).values():
        rows.update(range(num_rows)[index[0] if index else slice(None)])
    return np.array(sorted(rows))


def to_global(tree: Any, rows: np.ndarray, sharding: NamedSharding, num_rows: int) -> Any:
    """Global arrays [num_rows, ...] from the rows that this process read (`process_rows`)."""

    def assemble(local: np.ndarray) -> Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            start, stop, _ = (index[0] if index else slice(None)).indices(num_rows)
            first = int(np.searchsorted(rows, start))
            return local[first : first + stop - start]

        return jax.make_array_from_callback((num_rows, *local.shape[1:]), sharding, part)

    return jax.tree.map(assemble, tree)
