"""Where the devices of a mesh lie: `data` across nodes, `fsdp` and `tensor` inside one, as far as the numbers allow."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils


def place_devices(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array of `sizes`, the outer axes split over nodes first: they cross the slower network.

    A node is what has the faster network inside: a TPU slice or an NVLink domain where JAX tells several of them
    (`slice_index`), else a process (but on TPUs, whose interconnect spans the processes of a slice). Nodes of unequal
    size are placed in order, one after the other.
    """
    kind = _node_kind(devices)
    nodes = Counter(getattr(d, kind) for d in devices) if kind else Counter([0])
    if len(nodes) == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if len(set(nodes.values())) > 1:
        ordered = sorted(devices, key=lambda d: (getattr(d, kind), d.id))
        return np.asarray(ordered, dtype=object).reshape(sizes)
    across = split_over_nodes(sizes, len(nodes))
    inside = [size // nodes for size, nodes in zip(sizes, across, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        inside, across, devices, process_is_granule=kind == "process_index", allow_split_physical_axes=True
    )


def split_over_nodes(sizes: Sequence[int], num_nodes: int) -> list[int]:
    """How many nodes each axis spans: their product is `num_nodes`, which has to divide the product of `sizes`."""
    across = []
    for size in sizes:
        across.append(math.gcd(size, num_nodes))
        num_nodes //= across[-1]
    return across


def _node_kind(devices: Sequence[Any]) -> str:
    """The attribute that tells nodes apart, or nothing where all devices are in one."""
    several = lambda name: len({getattr(d, name, None) for d in devices}) > 1
    if several("slice_index"):
        return "slice_index"
    return "process_index" if devices[0].platform != "tpu" and several("process_index") else ""
