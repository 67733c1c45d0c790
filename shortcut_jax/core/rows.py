"""Which row of the global batch is of which kind, and which micro-batch it belongs to.

The kind of row i is a pure function of i, never of the mesh. The batch is B / P groups of P consecutive rows with the
same counts of each kind, so a split is a slice of an unsharded axis: slicing the leading rows of a sharded batch would
move activations between devices.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from shortcut_jax.core.types import Array


@dataclass(frozen=True)
class RowGroup:
    """Rows of each kind in a group of consecutive rows: self-distilled rows first, then flow-matching rows."""

    self_rows: int = 1
    flow_rows: int = 3

    @property
    def size(self) -> int:
        """P, the rows of a group."""
        return self.self_rows + self.flow_rows


def split_kinds(tree: Any, group: RowGroup) -> tuple[Any, Any]:
    """Splits the rows of every leaf [B, ...] into the self rows and the flow rows of each group, order kept."""

    def part(start: int, stop: int) -> Any:
        def take(x: Array) -> Array:
            grouped = x.reshape(x.shape[0] // group.size, group.size, *x.shape[1:])
            return grouped[:, start:stop].reshape(-1, *x.shape[1:])

        return jax.tree.map(take, tree)

    return part(0, group.self_rows), part(group.self_rows, group.size)


def merge_kinds(self_tree: Any, flow_tree: Any, group: RowGroup) -> Any:
    """The inverse of `split_kinds`."""

    def merge(a: Array, b: Array) -> Array:
        groups = (a.shape[0] + b.shape[0]) // group.size
        a = a.reshape(groups, group.self_rows, *a.shape[1:])
        b = b.reshape(groups, group.flow_rows, *b.shape[1:])
        both = jnp.concatenate([a, b], axis=1)
        return both.reshape(-1, *both.shape[2:])

    return jax.tree.map(merge, self_tree, flow_tree)


def micro_batches(tree: Any, num: int, group: RowGroup) -> Any:
    """Deals groups to micro-batches: [B, ...] -> [A, B / A, ...], where micro-batch a holds groups a, a + A, ...

    The interleaving keeps every device's rows on that device: each micro-batch takes an equal part of each shard.
    """

    def deal(x: Array) -> Array:
        rows = x.reshape(x.shape[0] // (num * group.size), num, group.size, *x.shape[1:])
        return rows.swapaxes(0, 1).reshape(num, -1, *x.shape[1:])

    return jax.tree.map(deal, tree)
