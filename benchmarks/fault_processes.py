"""Two real processes of one run on this machine, joined over loopback, with two simulated devices each."""

import signal
import threading
import time
from pathlib import Path

from tests.processes import start


def _copy(stream, path):
    with path.open("w") as file:
        for line in stream:
            file.write(line)
            file.flush()


def start_two(argv, errors, faults=("none", "none")):
    """Starts both; `faults` are those of `benchmarks.fault_child`, standard error goes to `errors`/PROCESS.txt."""
    pair = start(2, ["-m", "benchmarks.fault_child"], devices=2, extra=[(*f.split(), "--", *argv[1:]) for f in faults])
    for index, process in enumerate(pair):
        # Through a pipe: a process with a full disk can still say so.
        process.copier = threading.Thread(target=_copy, args=(process.stderr, Path(errors) / f"{index}.txt"))
        process.copier.start()
    return pair


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
