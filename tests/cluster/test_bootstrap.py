"""Processes that are missing, differ or fail: one clear line in each of them, and soon."""

import errno
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from shortcut_jax.cluster import rendezvous
from shortcut_jax.cluster.bootstrap import Place, find_place
from shortcut_jax.cluster.consistency import describe
from shortcut_jax.cluster.rendezvous import names
from shortcut_jax.cluster.shared_folder import check_folder
from shortcut_jax.errors import FolderError, JoinError
from tests.processes import error_lines, free_address, start, wait

VARIABLES = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "JAX_LOCAL_DEVICE_IDS",
    "CUDA_VISIBLE_DEVICES",
)


@pytest.fixture
def environment(monkeypatch):
    """Sets variables, after removing all that tell of a cluster."""
    for name in list(os.environ):
        if name in VARIABLES or name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JOB_")):
            monkeypatch.delenv(name)
    return lambda **values: [monkeypatch.setenv(name, str(value)) for name, value in values.items()]


def slurm(tasks, nodes, index, local, **more):
    values = dict(JOB_ID=4096 * 7 + 5, STEP_NODELIST="node[003-009]", NTASKS=tasks, STEP_NUM_TASKS=tasks)
    values |= dict(STEP_NUM_NODES=nodes, PROCID=index, LOCALID=local, **more)
    return {f"SLURM_{name}": value for name, value in values.items()}


def test_a_process_by_itself_is_alone(environment):
    environment()
    assert find_place() is None
    environment(JAX_NUM_PROCESSES=1)
    assert find_place("somewhere:1234") is None


def test_flags_go_before_variables(environment):
    environment(JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES=4, JAX_PROCESS_ID=3)
    assert find_place() == Place("a:1", 4, 3)
    assert find_place("b:2", 2, 0) == Place("b:2", 2, 0)


def test_a_shell_of_one_task_in_an_allocation_is_alone(environment):
    environment(**slurm(1, 1, 0, 0))
    assert find_place() is None
    environment(SLURM_NTASKS=4)  # the allocation has more; this step has one
    assert find_place() is None


def test_a_batch_script_of_several_tasks_is_alone_outside_a_step(environment):
    environment(SLURM_JOB_ID=3, SLURM_NTASKS=4, SLURM_PROCID=0, SLURM_LOCALID=0)
    assert find_place() is None


@pytest.mark.parametrize(
    ("tasks", "nodes", "local", "visible", "more", "ids"),
    [
        (2, 2, 0, "0,1,2,3", {}, None),  # a task a node has all of its GPUs
        (8, 2, 3, "0,1,2,3", {"GPUS_ON_NODE": 4}, [3]),  # a task a GPU
        (4, 2, 1, "0,1,2,3", {"GPUS_ON_NODE": 4}, [2, 3]),
        (8, 2, 3, "0", {"GPUS_ON_NODE": 4}, None),  # bound by Slurm: each task sees its own only
        (8, 2, 3, "", {}, None),  # there are none
        (8, 2, 3, None, {}, [3]),  # nothing says which: each has one, as by JAX's own rule
        (2, 2, 0, None, {}, None),
    ],
)
def test_slurm_tells_the_place_and_the_gpus_of_a_host_are_shared(environment, tasks, nodes, local, visible, more, ids):
    environment(**slurm(tasks, nodes, tasks - 1, local, **more))
    if visible is not None:
        environment(CUDA_VISIBLE_DEVICES=visible)
    assert find_place() == Place("node003:61445", tasks, tasks - 1, ids)


def test_gpus_that_are_named_for_jax_stay(environment):
    environment(**slurm(8, 2, 7, 3), JAX_LOCAL_DEVICE_IDS="2,3")
    assert find_place() == Place("node003:61445", 8, 7, None)


def test_gpus_that_cannot_be_shared_are_told(environment):
    environment(**slurm(3, 1, 1, 1), CUDA_VISIBLE_DEVICES="0,1,2,3")
    with pytest.raises(JoinError, match="4 GPUs of a host cannot be divided among its 3 processes"):
        find_place()


def test_open_mpi_tells_the_place(environment):
    uri = "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"
    environment(OMPI_MCA_orte_hnp_uri=uri, OMPI_COMM_WORLD_SIZE=4, OMPI_COMM_WORLD_RANK=2, OMPI_COMM_WORLD_LOCAL_RANK=0)
    place = find_place()
    assert place.address.startswith("10.96.0.1:") and place[1:] == (4, 2, None)
    environment(OMPI_COMM_WORLD_LOCAL_RANK=1, OMPI_COMM_WORLD_LOCAL_SIZE=2)
    assert find_place().local_device_ids == [1]


@pytest.mark.parametrize("values", [{"JOB_COMPLETION_INDEX": 1}, {"OMPI_COMM_WORLD_SIZE": 2}])
def test_several_processes_that_cannot_find_each_other_do_not_run_alone(environment, values):
    environment(**values)
    with pytest.raises(JoinError, match="says that there are several processes"):
        find_place()


def test_a_pod_that_is_no_member_of_an_indexed_job_is_alone(environment):
    environment(KUBERNETES_SERVICE_HOST="10.0.0.1")
    assert find_place() is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("a:1", None, None), "--num_processes and --process_id must be given too"),
        ((None, 4, 1), "--coordinator must be given too"),
        (("a", 4, 1), "'a', but must be HOST:PORT"),
        (("a:1", 4, 4), "process 4 is not one of 4 processes: ids are 0 to 3"),
    ],
)
def test_a_place_that_is_no_place_is_one_line(environment, given, message):
    environment()
    with pytest.raises(JoinError, match=message):
        find_place(*given)


def test_a_number_that_is_none_names_its_variable(environment):
    environment(JAX_NUM_PROCESSES="two")
    with pytest.raises(JoinError, match="JAX_NUM_PROCESSES is 'two'"):
        find_place()


def test_of_many_processes_the_first_are_named():
    assert names([3]) == "process 3" and names([5, 1]) == "processes 1, 5"
    assert names(range(20), most=3) == "processes 0, 1, 2 and 17 more"


def test_differences_are_grouped_by_value():
    facts = {0: {"steps": "4", "seed": "0"}, 1: {"steps": "6", "seed": "0"}, 2: {"steps": "4", "seed": "0"}}
    assert describe(facts) == "steps: 4 (processes 0, 2), 6 (process 1)"
    assert describe({0: {"a": "1"}, 1: {}}) == "a: 1 (process 0), absent (process 1)"
    assert describe({0: {"a": "1"}, 1: {"a": "1"}}) == ""


def test_a_port_in_use_is_told():
    server = socket.create_server(("", 0))
    with server as taken, pytest.raises(JoinError, match="process 0 cannot listen at localhost:"):
        rendezvous.meet(f"localhost:{taken.getsockname()[1]}", 2, 0, 5.0)


def test_nobody_is_alone_after_the_time_is_over():
    address, started = free_address(), time.monotonic()
    with pytest.raises(JoinError, match=f"process 1 of 2: the coordinator {address} did not answer within 1 s"):
        rendezvous.meet(address, 2, 1, 1.0)
    assert time.monotonic() - started < 10


# A program that joins and then does what it is told, as the mains do.
PROGRAM = """
import sys, time
from shortcut_jax import cli
from shortcut_jax.cluster import consistency, distributed, key_value, shared_folder
def main(argv):
    distributed.initialize(timeout=float(argv[1]))
    exec(argv[2])
cli.run(main)
"""


def _start(num, code, timeout=60, **more):
    return start(num, ["-c", PROGRAM, str(timeout), code], **more)


@pytest.mark.slow
def test_who_is_missing_is_said_by_all_who_came():
    codes, errors = wait(_start(4, "pass", timeout=10, only=(0, 2)))
    assert codes == [75, 75]
    for line in error_lines(errors):
        assert "after 10 s processes 1, 3 of 4 had not called at 127.0.0.1:" in line


@pytest.mark.slow
def test_two_processes_of_one_id_are_told():
    codes, errors = wait(_start(3, "pass", JAX_PROCESS_ID=["0", "1", "1"]))
    assert codes == [75, 75, 75]
    assert all("two processes have the id 1" in line for line in error_lines(errors))


@pytest.mark.slow
def test_processes_that_differ_are_told_where():
    code = "consistency.check_same({'steps': 4 + key_value.process_id() // 2, 'seed': 0})"
    codes, errors = wait(_start(3, code))
    assert codes == [1, 1, 1]
    for line in error_lines(errors):
        assert line == "error: the processes differ: steps: 4 (processes 0, 1), 5 (process 2)"


def test_unequal_numbers_of_devices_are_told():
    codes, errors = wait(_start(2, "consistency.check_devices()", JAX_NUM_CPU_DEVICES=["2", "1"]))
    assert codes == [1, 1]
    for line in error_lines(errors):
        assert "devices: 2 x cpu (process 0), 1 x cpu (process 1)" in line


def test_devices_that_do_not_come_up_are_told():
    code = "time.sleep(60 * key_value.process_id()); consistency.check_devices(timeout=3)"
    codes, errors = wait(_start(2, code))
    assert codes == [75, 75]
    assert all("after 3 s the devices of process" in line for line in error_lines(errors))


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_one_process_ends_all_with_a_line_that_says_which(failing):
    """Also where another is stuck in something that never ends."""
    code = (
        "from shortcut_jax.errors import ConfigError\n"
        f"if key_value.process_id() == {failing}: raise ConfigError('steps is -1')\n"
        "time.sleep(1000)"
    )
    started = time.monotonic()
    codes, errors = wait(_start(3, code))
    assert time.monotonic() - started < 60
    assert codes == [1, 1, 1]
    lines = error_lines(errors)
    assert lines.pop(failing) == "error: steps is -1"
    assert set(lines) == {f"error: process {failing} failed: steps is -1"}


def test_an_unexpected_error_keeps_its_traceback_and_the_others_may_try_again():
    code = "key_value.process_id() or 1 / 0\ntime.sleep(1000)"
    codes, errors = wait(_start(2, code))
    assert codes == [1, 75]
    assert "Traceback" in errors[0]
    assert error_lines(errors)[1] == "error: process 0 failed: ZeroDivisionError: division by zero"


@pytest.mark.slow
def test_processes_that_agree_end_well(tmp_path):
    folder = f"__import__('pathlib').Path({str(tmp_path)!r})"
    code = f"consistency.check_same({{'a': 1}}); shared_folder.check_folder({folder})"
    codes, errors = wait(_start(2, code))
    assert codes == [0, 0], errors
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_shared_is_told(tmp_path):
    code = (
        "from pathlib import Path\n"
        f"folder = Path({str(tmp_path)!r}) / str(key_value.process_id())\n"
        "shared_folder.check_folder(folder, patience=2)"
    )
    codes, errors = wait(_start(2, code))
    assert codes == [1, 1]
    for line in error_lines(errors):
        assert "is not shared: after 2 s process 1 does not see a file that process 0 wrote" in line


def _full(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_folder_is_told_and_nothing_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(FolderError, match=f"cannot write to {tmp_path}: No space left on device"):
        check_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match=r"file/run: Not a directory; choose another --workdir"):
        check_folder(tmp_path / "file" / "run")


def _train(num, arguments, workdir, *extra, **changes):
    argv = ["-m", "shortcut_jax.train", *arguments(workdir, **changes)[1:]]
    return wait(start(num, argv, extra=extra))


@pytest.mark.slow
def test_training_with_two_configs_is_told_in_both_before_anything_is_written(arguments, tmp_path):
    extra = ["--config.seed=1", "--config.data.threads=1"], ["--config.seed=2", "--config.ema.slow=0.5"]
    codes, errors = _train(2, arguments, tmp_path / "run", *extra)
    assert codes == [1, 1]
    for line in error_lines(errors):
        assert "seed: 1 (process 0), 2 (process 1)" in line and "ema.slow: 0.999 (process 0), 0.5 (process 1)" in line
        assert "threads" not in line  # a host's own affair
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_mesh_that_does_not_fit_is_told_in_every_process(arguments, tmp_path):
    codes, errors = _train(2, arguments, tmp_path / "run", mesh__data=3, mesh__fsdp=1)
    assert codes == [1, 1]
    assert all("mesh data 3 x fsdp 1 x tensor 1 needs 3 devices" in line for line in error_lines(errors))


def test_a_workdir_that_cannot_be_written_to_is_told_in_every_process(arguments, tmp_path):
    (tmp_path / "file").touch()
    codes, errors = _train(2, arguments, tmp_path / "file" / "run", mesh__data=2, mesh__fsdp=1)
    assert codes == [1, 1]
    assert all("cannot write to" in line and "Not a directory" in line for line in error_lines(errors))


def test_a_stranger_at_the_port_is_no_process():
    address = free_address()
    with ThreadPoolExecutor() as threads:
        first = threads.submit(rendezvous.meet, address, 2, 0, 60.0)
        for _ in range(50):
            try:
                with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                break
            except OSError:
                time.sleep(0.1)
        rendezvous.meet(address, 2, 1, 60.0)
        first.result()
