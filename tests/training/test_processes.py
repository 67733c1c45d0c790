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
from tests.process_worker import assembly_of, batch_of, continue_run
from tests.processes import run_jobs

FOUR_HEADS = {"model__width": 64, "model__heads": 4, "model__axes": (4, 6, 6)}
"""So that `tensor` can be split over the devices of two processes."""
BLOCKS = {
    2: {"model__double_blocks": 2, "model__single_blocks": 0, "objective": "flow"},
    4: {"model__double_blocks": 0, "model__single_blocks": 2, "objective": "flow"},
}
"""Small programs, for each process compiles its own for each mesh; the run of adapters has all kinds of targets."""

STEPS = 3
MESHES = {
    # Of four devices each: `fsdp` reaches across them; in the run of adapters `data` does, and fsdp stays inside.
    2: (1, 8, 1),
    # Of two devices each: `tensor` reaches across pairs of them, and `data` across the pairs.
    4: (2, 1, 4),
}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("highest_precision")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Workdirs with a checkpoint of one device, in which no weight, moment or EMA is zero or like another."""
    folder = tmp_path_factory.mktemp("sources")
    for num, blocks in BLOCKS.items():
        assembly, rng = tiny_assembly(**FOUR_HEADS, **blocks), np.random.default_rng(1)
        state = noisy_state(assembly)
        small = lambda x, rng=rng: (
            x if x.ndim == 0 else jnp.asarray(np.square(1e-4 * rng.standard_normal(x.shape, "f")))
        )
        state = state._replace(opt_state=jax.tree.map(small, state.opt_state))
        checkpoints = Checkpoints(folder / str(num) / "checkpoints")
        checkpoints.save(1, to_items(state), meta_of(1, assembly, state, None))
        checkpoints.close()
    return {num: folder / str(num) for num in BLOCKS}


def _one(workdir, mesh=(1, 1, 1)):
    return assembly_of(workdir, mesh, jax.devices()[: math.prod(mesh)])


@pytest.fixture(scope="module")
def ones(sources):
    """For each of them: what one device restored, its losses, its state after `STEPS` steps, and the next loss."""
    made = {}
    for num, source in sources.items():
        assembly = _one(source)
        with jax.default_matmul_precision("highest"):
            restored, losses, state = continue_run(assembly, source, STEPS)
            last = host_copy(to_items(state))
            _, metrics = assembly.train_step(state, batch_of(assembly, 1 + STEPS))
        made[num] = {path: value for path, _, value in restored}, losses, last, float(metrics["loss"])
    return made


def _job(workdir, mesh, steps, out=None):
    return {"workdir": str(workdir), "mesh": mesh, "steps": steps, "out": out and str(out)}


@pytest.fixture(scope="module")
def two(sources, distilled, tmp_path_factory):
    """Two processes continue the checkpoint of one, and a run of adapters.

    By name: the workdir, the result, and the shards of both processes before and after.
    """
    folder = tmp_path_factory.mktemp("two")
    jobs = {"run": _job(sources[2], MESHES[2], STEPS, folder / "run")}
    jobs["lora"] = _job(distilled, (2, 4, 1), 1, folder / "lora")
    results = run_jobs(2, 4, list(jobs.values()), folder / "jobs")
    return {name: (folder / name, *result) for name, result in zip(jobs, results, strict=True)}


@pytest.fixture(scope="module")
def four(sources, two, tmp_path_factory):
    """Four processes do so too; and they restore what two have saved."""
    folder = tmp_path_factory.mktemp("four")
    jobs = {"run": _job(sources[4], MESHES[4], STEPS, folder / "run")}
    jobs["of two"] = _job(two["run"][0], (1, 4, 2), 0)
    jobs["lora of two"] = _job(two["lora"][0], (8, 1, 1), 0)
    results = run_jobs(4, 2, list(jobs.values()), folder / "jobs")
    return {name: (folder / name, *result) for name, result in zip(jobs, results, strict=True)}


def _whole(shards):
    """Whole arrays from the shards of all processes, by path; copies of a shard have to be equal."""
    codec = {}
    for path, index, value in shards:
        stops = [n if part.stop is None else part.stop for part, n in zip(index, value.shape, strict=True)]
        codec[path] = np.maximum(codec.get(path, stops), stops).astype(int)
    made = {path: (np.zeros(codec[path], value.dtype), np.zeros(codec[path], bool)) for path, _, value in shards}
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
def test_many_processes_equal_one(num, ones, many):
    restored, losses, last, _ = ones[num]
    _, result, before, after = many
    assert (result["processes"], result["devices"]) == (num, 8)
    _assert_same(_whole(before), restored)
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


def test_what_two_processes_saved_one_goes_on_with(two, ones):
    workdir = two["run"][0]
    np.testing.assert_allclose(continue_run(_one(workdir), workdir, 1)[1], [ones[2][3]], rtol=1e-5)


def test_what_two_processes_saved_four_restore_exactly(two, four):
    _assert_same(_whole(four["of two"][2]), _whole(two["run"][3]))


def test_adapters_go_from_one_process_to_two_to_four_and_to_one(distilled, two, four):
    workdir, result, before, after = two["lora"]
    restored, losses, state = continue_run(_one(distilled), distilled, 1)
    _assert_same(_whole(before), _whole(restored))
    np.testing.assert_allclose(result["losses"], losses, rtol=1e-5)
    final = _whole(after)
    for path, value in flat_paths(state.params).items():
        np.testing.assert_allclose(final[f"params/{path}"], value, rtol=1e-4, atol=1e-7, err_msg=path)
    _assert_same(_whole(four["lora of two"][2]), final)
    for mesh in ((1, 1, 1), (2, 2, 2)):
        _assert_same(_whole(continue_run(_one(workdir, mesh), workdir, 0)[0]), final)
