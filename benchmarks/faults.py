"""Every fault that a run survives, with two processes: `python -m benchmarks.faults [--only=NAME ...] [--out=FILE]`.

Each fault strikes a run of two processes with two simulated CPU devices each, on the embedded digits, that saves every
4 of its 12 steps. Then the same command runs once more, as a scheduler would start it. The weights, EMAs and
moments of the last step are compared, bit by bit, with those of a run that nothing happened to, and the loss of every
step too: a sample that is lost or repeated would change both. Writes a Markdown table.
"""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

STEPS, EVERY = 12, 4
FLAGS = "--xla_backend_optimization_level=0"
CONFIG = {
    "model.preset": "tiny",
    "model.double_blocks": 0,
    "batch_size": 32,
    "steps": STEPS,
    "student_steps": "(1,2,4)",
    "student_weights": "()",
    "jumps": 2,
    "timestep_range": "(0.0,1.0)",
    "eval.steps": "(1,)",
    "eval.columns": 2,
    "eval.views": "()",
    "eval.images": "()",
    "optimizer.learning_rate": 0.02,
    "log_every": 1,
    "checkpoint_every": EVERY,
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "peer_timeout": 10,
    "watchdog.seconds": 8,
    "watchdog.slow_seconds": 120,
    "watchdog.grace_seconds": 2,
}


@dataclass
class Fault:
    """A fault: of which process, what is expected, and whether the run is started again."""

    name: str
    faults: tuple[str, str] = ("slow", "slow")
    signals: tuple[signal.Signals | None, signal.Signals | None] = (None, None)
    codes: tuple[int, int] = (75, 75)
    again: bool = True
    config: tuple[str, ...] = ()
    same: bool = True  # as the uninterrupted run


TERM, KILL = signal.SIGTERM, signal.SIGKILL
KEEP_ONE = ("--config.keep=1",)
FAULTS = (
    Fault("SIGTERM to process 0 only", signals=(TERM, None)),
    Fault("SIGTERM to process 1 only", signals=(None, TERM)),
    Fault("kill -9 of process 1", signals=(None, KILL), codes=(75, -9)),
    Fault("kill -9 of process 0 (coordinator)", signals=(KILL, None), codes=(-9, 75)),
    Fault("process 1 is stopped (SIGSTOP), as with its network gone", signals=(None, signal.SIGSTOP), codes=(75, -9)),
    Fault("process 0 is stopped (SIGSTOP)", signals=(signal.SIGSTOP, None), codes=(-9, 75)),
    Fault("kill -9 while saving step 8: folder made", ("slow save-temp:8", "slow"), codes=(-9, 75)),
    Fault("kill -9 while saving step 8: items partly written", ("slow save-items:8", "slow"), codes=(-9, 75)),
    Fault("the same in process 1", ("slow", "slow save-items:8"), codes=(75, -9)),
    Fault("kill -9 while saving step 8: before its commit", ("slow save-commit:8", "slow"), codes=(-9, 75)),
    Fault(
        "kill -9 while saving step 8, keep=1: before step 4 goes",
        ("slow save-delete:8", "slow"),
        codes=(-9, 75),
        config=KEEP_ONE,
    ),
    Fault("process 1 fails of an error of its own in step 6", ("slow", "slow fail:6"), codes=(75, 1)),
    Fault("the batch of step 6 never comes in process 1", ("slow", "slow hang:6")),
    Fault(
        "disk full in process 0 while saving step 8 (keep=1)",
        ("full:8 patience:15", "patience:15"),
        (None, None),
        (0, 0),
        False,
        KEEP_ONE,
    ),
    Fault("the folder is gone while saving step 8 (keep=1)", ("away:8", "none"), (None, None), (0, 0), False, KEEP_ONE),
    Fault("disk full while saving the last step", ("full:12 patience:15", "full:12 patience:15"), codes=(1, 1)),
    Fault(
        "a batch 1,000 times too large in step 8 (spikes.factor=3)",
        ("spike:8", "spike:8"),
        codes=(0, 0),
        again=False,
        config=("--config.spikes.factor=3", "--config.spikes.after=4", "--config.max_skipped=1"),
        same=False,
    ),
)


def command_line(workdir: Path, data: Path, *extra: str) -> list[str]:
    flags = [f"--config.{key}={value}" for key, value in {**CONFIG, "data.dir": data}.items()]
    return ["train", "--config=configs/digits.py", f"--workdir={workdir}", *flags, *extra]


def final(workdir: Path) -> dict:
    """The arrays of the last step, by path."""
    from shortcut_jax.core.tree import flat_paths
    from shortcut_jax.runtime.checkpoint import Checkpoints
    from shortcut_jax.steps.state import to_items
    from tests.helpers import tiny_assembly

    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    return flat_paths(checkpoints.restore(STEPS, to_items(tiny_assembly(student_steps=(1, 2, 4)).state_shapes)))


def losses(workdir: Path) -> dict[int, list[float]]:
    """The loss of each step; several where it was done again."""
    found: dict[int, list[float]] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "loss" in row:
            found.setdefault(row["step"], []).append(row["loss"])
    return found


def compare(workdir: Path, reference: Path) -> str:
    """What differs from the uninterrupted run; empty where nothing does."""
    import numpy as np

    mine, theirs = final(workdir), final(reference)
    different = sum(not np.array_equal(mine[path], value) for path, value in theirs.items())
    whole = {step: values[0] for step, values in losses(reference).items()}
    own = losses(workdir)
    wrong = [step for step in whole if step not in own or set(own[step]) != {whole[step]}]
    problems = [f"{different} arrays differ"] if different else []
    return "; ".join(problems + ([f"losses of steps {wrong} differ"] if wrong else []))


def strike(fault: Fault, folder: Path, data: Path, reference: Path) -> dict[str, str]:
    """One fault: a row of the table."""
    from benchmarks.fault_processes import end, start_two, wait_for

    workdir, logs = folder / "run", folder
    folder.mkdir(parents=True)
    argv = command_line(workdir, data, *fault.config)
    pair = start_two(argv, logs, fault.faults)
    if any(fault.signals):
        wait_for(lambda: max(losses(workdir), default=0) >= 5 if (workdir / "metrics.jsonl").exists() else False)
        struck = time.monotonic()
        for process, number in zip(pair, fault.signals, strict=True):
            if number:
                process.send_signal(number)
        if signal.SIGSTOP in fault.signals:
            stopped = fault.signals.index(signal.SIGSTOP)
            pair[1 - stopped].wait(100)
            seconds = time.monotonic() - struck
            pair[stopped].send_signal(KILL)
            codes, _, _ = end(pair)
        else:
            codes, _, seconds = end(pair)
    else:
        codes, first, last = end(pair)
        seconds = last - first
    said = [(logs / f"{i}.txt").read_text() for i in range(2)]
    signs = (r"process \d stops: ", "watchdog: ", r"SIG\w+: ", "writing the ", "no checkpoint of ", "error: ")
    pattern = "|".join(f"{sign}.*" for sign in (*signs, r"step \d+ was skipped"))
    lines = [f"{i}: {line}" for i, text in enumerate(said) for line in re.findall(pattern, text)]
    row = {"fault": fault.name, "codes": str(codes), "seconds": f"{seconds:.1f}", "said": "<br>".join(lines)}
    kept = sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())
    row["resumed"] = "was not stopped"
    if fault.again:
        (logs / "again").mkdir()
        again, _, _ = end(start_two(argv, logs / "again"))
        text = (logs / "again" / "0.txt").read_text()
        found = re.search(r"resuming at step (\d+)", text)
        row["resumed"] = f"{found[1] if found else 'none'} (complete: {', '.join(map(str, kept)) or 'none'})"
        if again != (0, 0) or (found and int(found[1]) != max(kept, default=-1)):
            row["resumed"] += f" FAILED: {again}"
    leftovers = [p.name for p in (workdir / "checkpoints").iterdir() if "tmp" in p.name]
    problems = _try_compare(workdir, reference) if fault.same else _spike_problems(workdir)
    row["samples"] = problems or ("none" if fault.same else "step 8 skipped and counted")
    if leftovers:
        row["samples"] += f"; FAILED: left {leftovers}"
    if codes != fault.codes or problems:
        row["samples"] += f"; FAILED: expected {fault.codes}"
    return row


def _try_compare(workdir: Path, reference: Path) -> str:
    try:
        return compare(workdir, reference)
    except Exception as error:  # the table tells of it, and the other faults go on
        return f"not comparable: {error}".splitlines()[0]


def _spike_problems(workdir: Path) -> str:
    rows = {row["step"]: row for row in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())}
    counted = [rows[step]["spikes"] for step in (7, 8, STEPS)] + [rows[STEPS]["skipped_total"]]
    return "" if counted == [0, 1, 1, 1] else f"counted {counted}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="a part of the names of the faults to run")
    parser.add_argument("--out", type=Path, help="file for the table, such as docs/faults.md")
    parser.add_argument("--folder", type=Path, help="where runs stay; a temporary folder by default")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS, "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    from benchmarks.fault_processes import end, start_two
    from shortcut_jax.data.records import DataSettings, open_source

    data, reference = folder / "data", folder / "reference"
    open_source(DataSettings(dir=str(data)))
    begin = time.monotonic()
    if not (reference / "checkpoints" / str(STEPS)).exists():
        codes, _, _ = end(start_two(command_line(reference, data), folder))
        if codes != (0, 0):
            print((folder / "0.txt").read_text(), file=sys.stderr)
            return 1
    rows = []
    for index, fault in enumerate(FAULTS):
        if not options.only or any(part in fault.name for part in options.only):
            shutil.rmtree(folder / str(index), ignore_errors=True)
            rows.append(strike(fault, folder / str(index), data, reference))
            print(json.dumps(rows[-1], indent=2), flush=True)
    names = {
        "fault": "fault",
        "seconds": "seconds until all had ended",
        "codes": "exit codes",
        "resumed": "resumed at",
        "samples": "samples lost or repeated",
        "said": "what was said (process: line)",
    }
    lines = [f"| {' | '.join(names.values())} |", "|" + " --- |" * len(names)]
    shorten = lambda text: text.replace(str(folder), "...").replace("|", "\\|")
    lines += [f"| {' | '.join(shorten(row[name]) for name in names)} |" for row in rows]
    table = "\n".join(lines)
    print(table)
    if options.out:
        hardware = f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}"
        minutes = (time.monotonic() - begin) / 60
        head = HEAD.format(date=time.strftime("%Y-%m-%d"), hardware=hardware, minutes=minutes, steps=STEPS, every=EVERY)
        options.out.write_text(f"{head}\n{table}\n")
    if options.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if "FAILED" in table else 0


HEAD = """# Faults that a run survives

Two real processes on one machine, two simulated devices each; {steps} steps on the embedded digits, a checkpoint every
{every}. Each fault is injected into a run; then the same command is rerun. The last weights, EMAs and moments, and the
loss of every step, are compared bit for bit with those of an undisturbed run: "none" means that all are the
same, so no sample was lost or repeated.

Written by `python -m benchmarks.faults --out=docs/faults.md`, {date}, {hardware}, in {minutes:.0f} minutes. The run had
`peer_timeout=10`, `watchdog.seconds=8` and `watchdog.grace_seconds=2`, and where the disk is full processes waited 15 s
instead of 600 for each other's part of a checkpoint. Seconds count from the signal; where a process strikes itself,
from the end of the first process to that of the last. Exit code 75 (EX_TEMPFAIL) asks a scheduler to start the command
again; -9 is the process that was killed. Not tried here: GPUs and TPUs, real networks, file systems over a network.
"""


if __name__ == "__main__":
    sys.exit(main())
