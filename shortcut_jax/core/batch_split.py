"""Which row of the global batch is of which kind, and which micro-batch it belongs to.

The kind of row i is a pure function of i, never of the mesh. The batch is B / P groups of P consecutive rows with the
same counts of each kind, so a split is a slice of an unsharded axis: slicing the leading rows of a sharded batch would
move activations between devices.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp

from shortcut_jax.core.setting import NOT_NEGATIVE, setting
from shortcut_jax.core.types import Array

KINDS = ("self", "rolled", "flow")
"""The kinds of rows, in their order within a group."""


@dataclass(frozen=True)
class RowGroup:
    """Rows of each kind in a group of consecutive rows, in the order of `KINDS`.

    Attributes:
      self_rows: self-distilled rows; with a teacher, a share of them, drawn anew each step, learns from it instead.
      flow_rows: flow-matching rows.
      rolled_rows: as self rows, from points that the slow EMA reaches from noise in place of noised images.
    """

    self_rows: int = setting(1, NOT_NEGATIVE)
    flow_rows: int = setting(3, NOT_NEGATIVE)
    rolled_rows: int = setting(0, NOT_NEGATIVE)

    @property
    def distilled(self) -> int:
        """Self and rolled rows together, the first of a group."""
        return self.self_rows + self.rolled_rows

    @property
    def counts(self) -> tuple[int, int, int]:
        """Rows of each of `KINDS`."""
        return self.self_rows, self.rolled_rows, self.flow_rows

    @property
    def size(self) -> int:
        """P, the rows of a group."""
        return sum(self.counts)


def split_kinds(tree: Any, group: RowGroup) -> tuple[Any, ...]:
    """Splits the rows of every leaf [B, ...] into those of each of `KINDS`, the order of groups and rows kept."""

    chex.assert_equal_shape_prefix(jax.tree.leaves(tree), 1)

    def part(start: int, stop: int) -> Any:
        def take(x: Array) -> Array:
            grouped = x.reshape(x.shape[0] // group.size, group.size, *x.shape[1:])
            return grouped[:, start:stop].reshape(-1, *x.shape[1:])

        return jax.tree.map(take, tree)

    bounds = list(itertools.accumulate(group.counts, initial=0))
    return tuple(part(start, stop) for start, stop in itertools.pairwise(bounds))


def merge_kinds(parts: Sequence[Any], group: RowGroup) -> Any:
    """The inverse of `split_kinds`; the part of a kind without rows is not looked at and may be None."""
    counts = [count for count in group.counts if count]

    def merge(*leaves: Array) -> Array:
        grouped = [x.reshape(-1, count, *x.shape[1:]) for x, count in zip(leaves, counts, strict=True)]
        merged = jnp.concatenate(grouped, axis=1)
        return merged.reshape(-1, *merged.shape[2:])

    return jax.tree.map(merge, *(part for part, count in zip(parts, group.counts, strict=True) if count))


def micro_batches(tree: Any, num: int, group: RowGroup) -> Any:
    """Deals groups to micro-batches: [B, ...] -> [A, B / A, ...], where micro-batch a holds groups a, a + A, ...

    The interleaving keeps every device's rows on that device: each micro-batch takes an equal part of each shard.
    """

    chex.assert_equal_shape_prefix(jax.tree.leaves(tree), 1)

    def deal(x: Array) -> Array:
        rows = x.reshape(x.shape[0] // (num * group.size), num, group.size, *x.shape[1:])
        return rows.swapaxes(0, 1).reshape(num, -1, *x.shape[1:])

    return jax.tree.map(deal, tree)
