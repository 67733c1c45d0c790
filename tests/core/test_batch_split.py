import chex
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.core.batch_split import RowGroup, merge_kinds, micro_batches, split_kinds

GROUPS = [
    RowGroup(1, 3),
    RowGroup(2, 2),
    RowGroup(3, 1),
    RowGroup(1, 1, rolled_rows=2),
]


def _tree(rows):
    index = jnp.arange(rows)
    return {"scalar": index, "wide": index[:, None, None] * 100 + jnp.arange(6).reshape(2, 3)}


@pytest.mark.parametrize("group", GROUPS)
def test_splitting_and_merging_are_inverse(group):
    tree = _tree(24)
    chex.assert_trees_all_equal(merge_kinds(split_kinds(tree, group), group), tree)
    parts = tuple(_tree(6 * count) for count in group.counts)
    merged = merge_kinds(parts, group)
    assert merged["wide"].shape == (24, 2, 3)
    chex.assert_trees_all_equal(split_kinds(merged, group), parts)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rows", [4, 24])
def test_the_kind_of_a_row_is_a_function_of_its_place_in_the_group(group, rows):
    self_part, rolled_part, flow_part = split_kinds(_tree(rows), group)
    place, is_self = np.arange(rows) % group.size, np.arange(rows) % group.size < group.self_rows
    np.testing.assert_array_equal(self_part["scalar"], np.flatnonzero(is_self))
    np.testing.assert_array_equal(rolled_part["scalar"], np.flatnonzero((place < group.distilled) & ~is_self))
    np.testing.assert_array_equal(flow_part["scalar"], np.flatnonzero(place >= group.distilled))
    np.testing.assert_array_equal(flow_part["wide"][:, 0, 0], flow_part["scalar"] * 100)


@pytest.mark.parametrize("group", [RowGroup(4, 0), RowGroup(0, 4), RowGroup(0, 0, 4)])
def test_a_group_of_one_kind_gives_all_rows_to_it(group):
    tree = _tree(8)
    parts = split_kinds(tree, group)
    assert [len(p["scalar"]) for p in parts] == [2 * count for count in group.counts]
    chex.assert_trees_all_equal(next(part for part, count in zip(parts, group.counts, strict=True) if count), tree)
    chex.assert_trees_all_equal(
        merge_kinds([part if count else None for part, count in zip(parts, group.counts, strict=True)], group), tree
    )


def test_micro_batch_a_holds_every_a_th_group():
    group = RowGroup(1, 1)
    dealt = micro_batches(jnp.arange(12), 3, group)
    np.testing.assert_array_equal(dealt, [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]])


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("num", [1, 2, 3])
def test_micro_batches_share_one_layout_of_kinds_and_deal_every_row_once(group, num):
    tree = _tree(24)
    dealt = micro_batches(tree, num, group)
    assert dealt["wide"].shape == (num, 24 // num, 2, 3)
    assert sorted(np.ravel(dealt["scalar"])) == list(range(24))
    np.testing.assert_array_equal(dealt["wide"][..., 0, 0], dealt["scalar"] * 100)
    for a in range(num):
        rows = np.asarray(dealt["scalar"][a])
        np.testing.assert_array_equal(rows % group.size, np.arange(24 // num) % group.size)
        np.testing.assert_array_equal(rows[:: group.size] // group.size, np.arange(a, 24 // group.size, num))
