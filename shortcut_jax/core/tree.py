"""Parameter trees by path: the first-match rule that sharding, weight decay and config marks share."""

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from shortcut_jax.core.types import Array

Value = TypeVar("Value")


def path_name(path: Sequence[Any]) -> str:
    """A key path of `jax.tree_util` as `a/b/c`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def first_match(rules: Sequence[tuple[str, Value]], name: str) -> Value:
    """The value of the first rule whose regular expression matches the whole of `name`.

    Raises:
      KeyError: no rule matches.
    """
    for pattern, value in rules:
        if re.fullmatch(pattern, name):
            return value
    raise KeyError(f"no rule matches {name!r}")


def match_tree(rules: Sequence[tuple[str, Value]], tree: Any) -> Any:
    """A tree of `first_match` values, one a leaf. Raises KeyError for a leaf without a rule."""
    return jax.tree_util.tree_map_with_path(lambda path, _: first_match(rules, path_name(path)), tree)


def flat_paths(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path name, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def count_parameters(tree: Any) -> int:
    """The number of scalars in a tree of arrays or of abstract shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def global_norm(tree: Any) -> Array:
    """The Euclidean norm of all leaves together, accumulated in float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))


def distance(a: Any, b: Any) -> Array:
    """The Euclidean norm of the difference of two trees, in float32."""
    return global_norm(jax.tree.map(lambda x, y: x.astype(jnp.float32) - y.astype(jnp.float32), a, b))
