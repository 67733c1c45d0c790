"""Devices that are only described: which of them share a node, and which of them an axis of the mesh joins."""

from types import SimpleNamespace

import pytest

from shortcut_jax.runtime.placement import place_devices, split_over_nodes


def _gpus(nodes, gpus, processes_a_node=1, slices=True):
    """GPUs of several nodes, listed process by process as JAX does."""
    described = []
    for i in range(nodes * gpus):
        node, local = divmod(i, gpus)
        process = node * processes_a_node + local * processes_a_node // gpus
        told = {"slice_index": node if slices else 0}
        described.append(SimpleNamespace(id=i, process_index=process, platform="gpu", device_kind="H100", **told))
    return described


def _tpus(slices, side):
    """Slices of side x side chips, each process with two of them."""
    described = []
    for i in range(slices * side * side):
        index, local = divmod(i, side * side)
        coords = [local % side, local // side, 0]
        told = dict(coords=coords, core_on_chip=0, slice_index=index, process_index=i // 2, id=i)
        described.append(SimpleNamespace(platform="tpu", device_kind="TPU v5p", **told))
    return described


def _crossing(mesh, axis, attribute):
    """How many nodes a line along an axis touches, at most."""
    index = {"data": 0, "fsdp": 1, "tensor": 2}[axis]
    lines = mesh.swapaxes(index, 2).reshape(-1, mesh.shape[index])
    return max(len({getattr(d, attribute) for d in line}) for line in lines)


@pytest.mark.parametrize("slices", [True, False])
@pytest.mark.parametrize("sizes", [(4, 8, 1), (4, 4, 2), (8, 2, 2), (16, 1, 2), (4, 1, 8)], ids=str)
def test_shards_stay_inside_a_node_where_they_fit(sizes, slices):
    devices = _gpus(4, 8, slices=slices)
    mesh = place_devices(sizes, devices[::-1])
    assert mesh.shape == sizes and {d.id for d in mesh.flat} == set(range(32))
    for axis in ("fsdp", "tensor"):
        assert _crossing(mesh, axis, "process_index") == 1
    assert _crossing(mesh, "data", "process_index") == 4


def test_a_node_of_several_processes_is_one_node():
    mesh = place_devices((2, 4, 2), _gpus(2, 8, processes_a_node=8))
    assert _crossing(mesh, "fsdp", "slice_index") == _crossing(mesh, "tensor", "slice_index") == 1
    assert _crossing(mesh, "data", "slice_index") == 2


def test_what_does_not_fit_into_a_node_crosses_with_fsdp_before_tensor():
    mesh = place_devices((1, 16, 2), _gpus(4, 8))
    assert (_crossing(mesh, "fsdp", "process_index"), _crossing(mesh, "tensor", "process_index")) == (4, 1)
    mesh = place_devices((1, 1, 8), _gpus(2, 4))
    assert _crossing(mesh, "tensor", "process_index") == 2


@pytest.mark.parametrize(("sizes", "crossing"), [((4, 4, 4), (4, 1, 1)), ((2, 16, 2), (2, 2, 1))], ids=str)
def test_slices_are_joined_by_data_first_and_the_processes_of_a_slice_are_no_nodes(sizes, crossing):
    mesh = place_devices(sizes, _tpus(4, 4))
    assert {d.id for d in mesh.flat} == set(range(64))
    assert tuple(_crossing(mesh, axis, "slice_index") for axis in ("data", "fsdp", "tensor")) == crossing
    one = place_devices((2, 4, 2), _tpus(1, 4))
    assert {d.id for d in one.flat} == set(range(16))


def test_unequal_nodes_are_placed_one_after_the_other():
    devices = [d for d in _gpus(2, 4) if d.id != 7] + _gpus(3, 4)[8:9]
    mesh = place_devices((2, 4, 1), devices[::-1])
    assert [d.id for d in mesh.flat] == [0, 1, 2, 3, 4, 5, 6, 8]


def test_the_nodes_that_each_axis_spans_multiply_to_all():
    assert split_over_nodes((4, 8, 2), 8) == [4, 2, 1]
    assert split_over_nodes((6, 2, 1), 4) == [2, 2, 1]
    assert split_over_nodes((1, 1, 8), 8) == [1, 1, 8]
