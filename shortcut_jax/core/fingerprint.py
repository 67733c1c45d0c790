"""A content hash of parameters that does not depend on file format, mesh or order of summation."""

import hashlib
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shortcut_jax.core.tree import flat_paths
from shortcut_jax.core.types import Array

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def _mix(x: Array) -> Array:
    """The finaliser of MurmurHash3, a bijection of 32 bits in which every input bit reaches every output bit."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


@partial(jax.jit, static_argnames="seed")
def _leaf(x: Array, seed: int) -> Array:
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.full(x.shape, seed, jnp.uint32)
    for axis in range(x.ndim):
        place = _mix(place + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(0x9E3779B1))
    return jnp.sum(_mix(bits ^ place), dtype=jnp.uint32)


def fingerprint(tree: Any) -> str:
    """Sixteen hexadecimal digits that change when a value, shape, dtype or path of the tree does.

    Each value is hashed with its place, in 64 bits, and the hashes are added up as integers: devices hash what they
    hold. It guards against mistakes, not against an adversary.
    """
    flat = flat_paths(tree)
    sums = jax.device_get({path: _sums(x) for path, x in flat.items()})
    return _digest({path: _line(path, x, sums[path]) for path, x in flat.items()})


def fingerprint_of(leaves: Iterable[tuple[str, Any]]) -> str:
    """The `fingerprint` of a tree whose leaves come one at a time, each with its path; none is kept."""
    lines = {}
    for path, x in leaves:
        lines[path] = _line(path, x, jax.device_get(_sums(x)))
        del x  # before the next one is made
    return _digest(lines)


def _sums(x: Array) -> list[Array]:
    return [_leaf(x, seed) for seed in (1, 2)]


def _line(path: str, x: Array, sums: Any) -> str:
    return f"{path} {x.dtype} {tuple(x.shape)} {[int(np.asarray(part)) for part in sums]}\n"


def _digest(lines: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for path in sorted(lines):
        digest.update(lines[path].encode())
    return digest.hexdigest()[:16]
