"""Two real processes of one run on this machine, joined over loopback, with two simulated devices each."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path


def _copy(stream, path):
    with path.open("w") as file:
        for line in stream:
            file.write(line)
            file.flush()


def start_two(argv, errors, faults=("none", "none")):
    """Starts both; `faults` are those of `tests.fault_child`, standard error goes to `errors`/PROCESS.txt."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    variables = {**os.environ, "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=2", **address}

    def start(index):
        line = [sys.executable, "-m", "tests.fault_child", *faults[index].split(), "--", *argv[1:]]
        process = subprocess.Popen(
            line, env={**variables, "JAX_PROCESS_ID": str(index)}, stderr=subprocess.PIPE, text=True
        )
        # Through a pipe: a process with a full disk can still say so.
        process.copier = threading.Thread(target=_copy, args=(process.stderr, Path(errors) / f"{index}.txt"))
        process.copier.start()
        return process

    return [start(index) for index in range(2)]


def wait_for(condition, seconds=200.0):
    """Waits until something is the case; returns it."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > until:
            raise TimeoutError(f"nothing within {seconds:g} s")
        time.sleep(0.05)
    return value


def end(pair, seconds=200.0):
    """Waits for both: exit codes, and seconds until the first and until the last had ended."""
    begin, ended = time.monotonic(), {}
    try:
        while len(ended) < len(pair) and time.monotonic() < begin + seconds:
            for index, process in enumerate(pair):
                if index not in ended and process.poll() is not None:
                    ended[index] = time.monotonic() - begin
            time.sleep(0.02)
    finally:
        for process in pair:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
            process.copier.join(10)
    return tuple(process.returncode for process in pair), min(ended.values(), default=seconds), max(ended.values())
