"""Several real processes against one: the same losses and states, and checkpoints that any number of them restores."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.core.tree import flat_paths
from shortcut_jax.run.workdir import meta_of
from shortcut_jax.runtime.checkpoint import Checkpoints
from shortcut_jax.steps.state import to_items
from tests.helpers import host_copy, noisy_state, relative, tiny_assembly
from tests.process_worker import assembly_of, continue_run
from tests.processes import run_jobs

SMALL = {"model__width": 64, "model__heads": 4, "model__axes": (4, 6, 6), "objective": "flow"}
"""A small program, for each process compiles it; four heads, so that `tensor` can be split over those of two."""

STEPS = 3
MESHES = {
    # Of four devices each: `fsdp` reaches across them. These two restore and save; test_train has two that train.
    2: (1, 8, 1),
    # Of two devices each: `tensor` reaches across pairs of them, and `data` across the pairs.
    4: (2, 1, 4),
}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("highest_precision")]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A workdir with a checkpoint of one device, in which no weight, moment or EMA is zero or like another."""
    workdir = tmp_path_factory.mktemp("source")
    assembly, rng = tiny_assembly(**SMALL), np.random.default_rng(1)
    state = noisy_state(assembly)
    small = lambda x: x if x.ndim == 0 else jnp.asarray(np.square(1e-4 * rng.standard_normal(x.shape, "f")))
    state = state._replace(opt_state=jax.tree.map(small, state.opt_state))
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save(1, to_items(state), meta_of(1, assembly, state, None))
    checkpoints.close()
    return workdir


def _one(workdir, mesh=(1, 1, 1)):
    return assembly_of(workdir, mesh, jax.devices()[: math.prod(mesh)])


@pytest.fixture(scope="module")
def one(source):
    """What one device restored, its losses, and its state after `STEPS` steps."""
    with jax.default_matmul_precision("highest"):
        restored, losses, state = continue_run(_one(source), source, STEPS)
    return {path: value for path, _, value in restored}, losses, host_copy(to_items(state))


def _job(workdir, mesh, steps, out=None):
    return {"workdir": str(workdir), "mesh": mesh, "steps": steps, "out": out and str(out)}


@pytest.fixture(scope="module")
def two(source, distilled, tmp_path_factory):
    """Two processes save again what one has saved, of a run and of one with adapters.

    By name: the workdir, the result, and the shards of both processes before and after.
    """
    folder = tmp_path_factory.mktemp("two")
    jobs = {"run": _job(source, MESHES[2], 0, folder / "run")}
    jobs["lora"] = _job(distilled, (2, 4, 1), 0, folder / "lora")
    results = run_jobs(2, 4, list(jobs.values()), folder / "jobs")
    return {name: (folder / name, *result) for name, result in zip(jobs, results, strict=True)}


@pytest.fixture(scope="module")
def four(source, two, tmp_path_factory):
    """Four processes train; and they restore what two have saved."""
    folder = tmp_path_factory.mktemp("four")
    jobs = {"run": _job(source, MESHES[4], STEPS, folder / "run")}
    jobs["of two"] = _job(two["run"][0], (1, 4, 2), 0)
    jobs["lora of two"] = _job(two["lora"][0], (8, 1, 1), 0)
    results = run_jobs(4, 2, list(jobs.values()), folder / "jobs")
    return {name: (folder / name, *result) for name, result in zip(jobs, results, strict=True)}


def _whole(shards):
    """Whole arrays from the shards of all processes, by path; copies of a shard have to be equal."""
    shapes = {}
    for path, index, value in shards:
        stops = [n if part.stop is None else part.stop for part, n in zip(index, value.shape, strict=True)]
        shapes[path] = np.maximum(shapes.get(path, stops), stops).astype(int)
    made = {path: (np.zeros(shapes[path], value.dtype), np.zeros(shapes[path], bool)) for path, _, value in shards}
    for path, index, value in shards:
        array, filled = made[path]
        assert not filled[index].any() or np.array_equal(array[index], value), path
        array[index], filled[index] = value, True
    assert all(filled.all() for _, filled in made.values())
    return {path: array for path, (array, _) in made.items()}


def _assert_same(one, other):
    assert one.keys() == other.keys()
    for path, value in other.items():
        np.testing.assert_array_equal(one[path], value, err_msg=path)
        assert one[path].dtype == value.dtype


@pytest.fixture
def many(num, request):
    """What several processes made of the checkpoint of one."""
    return request.getfixturevalue({2: "two", 4: "four"}[num])["run"]


@pytest.mark.parametrize("num", MESHES)
def test_many_processes_restore_what_one_has_saved(num, one, many):
    _, result, before, _ = many
    assert (result["processes"], result["devices"]) == (num, 8)
    _assert_same(_whole(before), one[0])


def test_many_processes_equal_one(one, four):
    restored, losses, last = one
    _, result, _, after = four["run"]
    np.testing.assert_allclose(result["losses"], losses, rtol=1e-5)
    assert len(set(losses)) == STEPS
    final = _whole(after)
    for item, tree in last.items():
        expected = flat_paths(tree)
        pick = lambda values, item=item, expected=expected: [values[f"{item}/{path}"] for path in expected]
        assert relative(pick(final), list(expected.values())) <= 1e-5, item
        # Not vacuous: the steps moved everything far beyond the tolerance.
        assert relative(pick(restored), list(expected.values())) > 1e-3, item


@pytest.mark.parametrize("num", MESHES)
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2), (8, 1, 1)], ids=str)
def test_what_many_processes_saved_one_restores_exactly(num, mesh, many):
    workdir, _, _, after = many
    restored = continue_run(_one(workdir, mesh), workdir, 0)[0]
    _assert_same(_whole(restored), _whole(after))


def test_what_two_processes_saved_four_restore_exactly(two, four):
    _assert_same(_whole(four["of two"][2]), _whole(two["run"][3]))


def test_adapters_go_from_one_process_to_two_to_four_and_to_one(distilled, two, four):
    workdir, _, before, after = two["lora"]
    saved = _whole(continue_run(_one(distilled), distilled, 0)[0])
    _assert_same(_whole(before), saved)
    _assert_same(_whole(after), saved)
    _assert_same(_whole(four["lora of two"][2]), saved)
    for mesh in ((1, 1, 1), (2, 2, 2)):
        _assert_same(_whole(continue_run(_one(workdir, mesh), workdir, 0)[0]), saved)
