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


def run_jobs(num, devices, jobs, folder):
    """Has `num` processes do the jobs of `tests.process_worker` one after the other.

    Returns:
      For each job: its result, and the shards (path, index, values) that all processes held before and after it.
    """
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps(jobs))
    started = start(num, ["-m", "tests.process_worker", str(folder)], devices=devices)
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


def start(num, argv, devices=None, only=None, extra=None, **variables_of_each):
    """Starts `num` joined processes (or `only` these of them), which `wait` collects.

    Each has `devices` simulated devices, or as many as its variables say (one, by default). `extra` gives more
    arguments for each process, and other names the values of a variable in each.
    """
    address, extra = free_address(), extra or [()] * num
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    if devices is not None:
        flags = f"{flags} --xla_force_host_platform_device_count={devices}"

    def run(index):
        variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(num), "JAX_PROCESS_ID": str(index)}
        variables |= {"XLA_FLAGS": flags} | {name: values[index] for name, values in variables_of_each.items()}
        line = [sys.executable, *argv, *extra[index]]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(line, env={**os.environ, **variables}, **quiet)

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
