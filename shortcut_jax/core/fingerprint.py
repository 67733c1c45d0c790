"""A content hash of parameters that does not depend on file format, mesh or order of summation."""

import hashlib
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
    digest = hashlib.sha256()
    sums = {path: [_leaf(x, seed) for seed in (1, 2)] for path, x in flat_paths(tree).items()}
    for path, parts in sorted(jax.device_get(sums).items()):
        x = flat_paths(tree)[path]
        digest.update(f"{path} {x.dtype} {tuple(x.shape)} {[int(np.asarray(p)) for p in parts]}\n".encode())
    return digest.hexdigest()[:16]
