"""Several processes on one machine, joined over loopback, each with simulated devices."""

import json
import os
import pickle
import socket
import subprocess
import sys


def start_processes(num, devices, argv):
    """Starts `num` times `python argv` with `devices` devices each; returns the processes."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": str(num)}

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
