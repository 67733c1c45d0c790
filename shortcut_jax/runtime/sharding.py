"""Meshes and shardings: two tables, one for parameters by path and one for activations by logical axis."""

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
from shortcut_jax.models.linear import Constrain, Names

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "shard": ("fsdp",),
}
"""Logical axis -> mesh axes, for activations and for kernels inside a step."""

P = PartitionSpec
PARAM_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    # Blocks, with their leading depth axis: `tensor` splits heads and the MLP width only.
    (r".*_blocks/.*qkv/kernel", P(None, "fsdp", None, "tensor", None)),
    (r".*_blocks/.*qkv/bias", P(None, None, "tensor", None)),
    (r".*_blocks/.*attn_out/kernel", P(None, "tensor", None, "fsdp")),
    (r".*_blocks/.*mlp_(in|gate)/kernel", P(None, "fsdp", "tensor")),
    (r".*_blocks/.*mlp_in/bias", P(None, "tensor")),
    (r".*_blocks/.*mlp_out/kernel", P(None, "tensor", "fsdp")),
    (r".*_blocks/.*modulation/linear/kernel", P(None, "fsdp", None, None)),
    # Adapters: the axes that they share with their kernel are split like it, the rank never.
    (r".*_blocks/.*qkv/a", P(None, "fsdp", None, None)),
    (r".*_blocks/.*qkv/b", P(None, None, None, "tensor", None)),
    (r".*_blocks/.*(attn|mlp)_out/a", P(None, "tensor")),
    (r".*_blocks/.*(attn|mlp)_out/b", P(None, None, "fsdp")),
    (r".*_blocks/.*mlp_in/a", P(None, "fsdp", None)),
    (r".*_blocks/.*mlp_in/b", P(None, None, "tensor")),
    (r".*_blocks/.*modulation/linear/a", P(None, "fsdp", None)),
    (r".*/a|.*/b", P()),
    # The autoencoder is small: its convolutions are whole.
    (r"(.*/)?(encoder|decoder)/.*kernel", P()),
    # Ends.
    (r"(.*/)?token_embedding", P(None, "fsdp")),
    (r"(.*/)?position_(bias|embedding)", P()),
    (r".*final_modulation/linear/kernel", P("fsdp", None, None)),
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
"""The same for a whole train state: moments and averages end in the path of their parameter."""


@dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis.

    Attributes:
      data: copies of the weights, each with its part of the batch.
      fsdp: shards of weights, moments and averages, each with its part of the batch.
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


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the given devices (all, by default), with axes that the partitioner propagates through.

    JAX would make `Explicit` axes by default, which refuse the sharding constraints used here.
    """
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    sizes = (shape.data, shape.fsdp, shape.tensor)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=axis_types, devices=devices)


def fit_spec(mesh: Mesh, spec: Iterable[Any], shape: Sequence[int]) -> PartitionSpec:
    """A spec without the mesh axes that do not divide their dimension, and without axes of size 1."""
    fitted = []
    for size, entry in zip_longest(shape, spec):
        axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
        axes = tuple(a for a in axes if mesh.shape[a] > 1)
        fits = axes and size % math.prod(mesh.shape[a] for a in axes) == 0
        fitted.append((axes[0] if len(axes) == 1 else axes) if fits else None)
    return P(*fitted)


def make_constrain(mesh: Mesh) -> Constrain:
    """The function by which models reach the activation table: constrain(x, logical names) -> x.

    A name of None says that the axis is whole on every device.
    """

    def constrain(x: Array, names: Names) -> Array:
        spec = [LOGICAL_AXES[name] if name else None for name in names]
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fit_spec(mesh, spec, x.shape)))

    return constrain


def make_per_shard(mesh: Mesh) -> PerShard:
    """Wraps a kernel of q, k, v [B, L, H, K] so that each device runs it on its own rows and heads."""
    spec = P(BATCH_AXES, None, "tensor", None)
    return lambda kernel: jax.shard_map(kernel, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """A NamedSharding for each leaf of a parameter tree or train state, by `STATE_RULES`.

    A dimension that its mesh axis does not divide stays whole. Raises KeyError for a leaf without a rule.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        spec: PartitionSpec = first_match(STATE_RULES, path_name(path))
        return NamedSharding(mesh, fit_spec(mesh, spec, leaf.shape))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def describe_shardings(shardings: Any, tree: Any) -> str:
    """The resolved table, a line a parameter: path, shape, spec."""
    flat, shapes = flat_paths(shardings), flat_paths(tree)
    return "\n".join(f"{name}  {tuple(shapes[name].shape)}  {tuple(s.spec)}" for name, s in flat.items())


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
