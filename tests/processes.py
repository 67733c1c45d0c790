"""Several processes on one machine, joined over loopback, each with simulated devices."""

import json
import os
import pickle
import re
import socket
import subprocess
import sys


def free_address():
    """A host:port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start_processes(num, devices, argv):
    """Starts `num` times `python argv` with `devices` devices each; returns the processes."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    address = {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": str(num)}

    def start(index):
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PROCESS_ID": str(index), **address}
        return subprocess.Popen([sys.executable, *argv], env=environment, stderr=subprocess.PIPE, text=True)

    return [start(index) for index in range(num)]


def run_jobs(num, devices, jobs, folder):
    """Has `num` processes do the jobs of `tests.process_worker` one after the other.

    Returns:
      For each job: its result, and the shards (path, index, values) that all processes held before and after it.
    """
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps(jobs))
    started = start_processes(num, devices, ["-m", "tests.process_worker", str(folder)])
    try:
        errors = [process.communicate(timeout=400)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * num, "\n".join(errors)
    results = json.loads((folder / "results.json").read_text())
    shards = [pickle.loads((folder / f"shards-{index}.pickle").read_bytes()) for index in range(num)]
    together = lambda i, when: [shard for one in shards for shard in one[i][when]]
    return [(result, together(i, 0), together(i, 1)) for i, result in enumerate(results)]


def start(num, argv, only=None, extra=None, **variables_of_each):
    """Starts `num` joined processes with a device each (or `only` these), which `wait` collects.

    `extra` gives more arguments for each process, and other names the values of a variable in each.
    """
    address, extra = free_address(), extra or [()] * num
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")

    def run(index):
        variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(num), "JAX_PROCESS_ID": str(index)}
        variables |= {"XLA_FLAGS": flags} | {name: values[index] for name, values in variables_of_each.items()}
        line = [sys.executable, *argv, *extra[index]]
        return subprocess.Popen(
            line, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return [run(index) for index in (range(num) if only is None else only)]


def wait(processes, timeout=100):
    """Exit code and standard error of each process."""
    errors = [process.communicate(timeout=timeout)[1] for process in processes]
    return [process.returncode for process in processes], errors


def error_lines(errors):
    """The one line of error in each of several standard errors, without the process that marks it."""
    unmarked = [re.sub(r"^\[process \d+\] ", "", text, flags=re.MULTILINE) for text in errors]
    lines = [[line for line in text.splitlines() if line.startswith("error: ")] for text in unmarked]
    assert all(len(found) == 1 for found in lines), errors
    return [found[0] for found in lines]
