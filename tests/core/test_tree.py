from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.core.tree import count_parameters, distance, first_match, flat_paths, global_norm, match_tree


class Pair(NamedTuple):
    left: object
    right: object


def _tree():
    return {"block": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.array([3.0])}, "pair": Pair([jnp.zeros(4)], {})}


def test_the_first_matching_rule_wins():
    rules = [("a/.*", 1), (".*/kernel", 2), (".*", 3)]
    assert [first_match(rules, name) for name in ("a/kernel", "b/kernel", "b/bias")] == [1, 2, 3]


def test_a_rule_must_match_the_whole_name():
    assert first_match([("kernel", 1), ("a/kernel", 2), (".*", 3)], "a/kernel") == 2
    assert first_match([("a", 1), (".*", 3)], "a/kernel") == 3


def test_a_name_without_a_rule_raises_and_is_named():
    with pytest.raises(KeyError, match="a/kernel"):
        first_match([("kernel", 1)], "a/kernel")


def test_a_false_value_is_a_match():
    assert first_match([("a", None), ("a", 1)], "a") is None


def test_paths_name_dictionary_keys_fields_and_indices():
    assert list(flat_paths(_tree())) == ["block/bias", "block/kernel", "pair/left/0"]
    np.testing.assert_array_equal(flat_paths(_tree())["block/bias"], [3.0])


def test_matching_a_tree_keeps_its_structure():
    matched = match_tree([(".*/bias", "b"), ("block/.*", "k"), ("pair/.*", "p")], _tree())
    assert matched == {"block": {"kernel": "k", "bias": "b"}, "pair": Pair(["p"], {})}


def test_matching_a_tree_raises_for_a_leaf_without_a_rule():
    with pytest.raises(KeyError, match="pair/left/0"):
        match_tree([("block/.*", 1)], _tree())


def test_parameters_are_counted_for_arrays_and_for_shapes():
    assert count_parameters(_tree()) == 2 * 3 + 1 + 4
    assert count_parameters(jax.eval_shape(_tree)) == 11


def test_global_norm_is_over_all_leaves():
    assert np.isclose(global_norm(_tree()), np.sqrt(6 * 4 + 9))


def test_global_norm_of_bfloat16_is_accumulated_in_float32():
    norm = global_norm({"a": jnp.ones(1000, jnp.bfloat16), "b": jnp.ones(1, jnp.bfloat16)})
    assert norm.dtype == jnp.float32
    assert np.isclose(norm, np.sqrt(1001), rtol=1e-6)


def test_distance_is_the_norm_of_the_difference_across_dtypes():
    a, b = {"x": jnp.array([1.0, 5.0])}, {"x": jnp.array([4.0, 1.0], jnp.bfloat16)}
    assert float(distance(a, b)) == 5.0
    assert float(distance(a, a)) == 0.0
    close = {"x": jnp.array([1.001, 5.0])}
    assert np.isclose(distance(close, jax.tree.map(lambda x: x.astype(jnp.bfloat16), a)), 0.001, rtol=1e-3)
