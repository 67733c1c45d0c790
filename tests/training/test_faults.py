"""Faults of real processes; `python -m benchmarks.faults` strikes with all of them and compares more."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import fault_child
from benchmarks.fault_processes import end, start_two, wait_for
from shortcut_jax import cli, train
from shortcut_jax.cluster.goodput import account
from shortcut_jax.cluster.json_lines import read_lines
from shortcut_jax.cluster.watchdog import Watchdog
from shortcut_jax.core.tree import flat_paths
from shortcut_jax.runtime import checkpoint
from shortcut_jax.runtime.checkpoint import Checkpoints
from shortcut_jax.runtime.metrics import read_metrics
from shortcut_jax.steps.state import to_items
from shortcut_jax.training import loop, session
from tests.helpers import BOTH_BLOCKS, tiny_assembly

pytestmark = pytest.mark.usefixtures("one_device")


NO_REPORT = {"eval.views": "()", "eval.images": "()"}
TWO = {**NO_REPORT, "objective": "flow", "mesh.data": 2, "mesh.fsdp": 2, "steps": 1_000_000, "peer_timeout": 4}
INT, TERM, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL


def _state(workdir, step):
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    shapes = tiny_assembly(student_steps=(1, 2, 4), **BOTH_BLOCKS).state_shapes
    return flat_paths(checkpoints.restore(step, to_items(shapes)))


def _steps(workdir):
    return Checkpoints(workdir / "checkpoints", read_only=True).steps()


def _second_is_refused(argv, workdir, pid, capfd):
    with pytest.raises(SystemExit):
        cli.run(train.main, argv)
    assert f"error: {workdir} is in use by process {pid} on " in capfd.readouterr().err
    assert account(read_lines(workdir / "goodput.jsonl")).sessions == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "codes", "limit"),
    [
        ((None, TERM), (75, 75), 60),
        ((INT, None), (130, 75), 60),
        ((None, KILL), (75, -9), 30),
        ((KILL, None), (-9, 75), 20),
    ],
    ids=["SIGTERM to 1", "Ctrl-C to 0", "kill of 1", "kill of 0"],
)
def test_a_signal_to_one_process_ends_both_in_time(signals, codes, limit, tmp_path, arguments, capfd):
    """SIGTERM to both is tried in test_launch. A second run in their workdir is refused meanwhile."""
    workdir = tmp_path / "run"
    pair = start_two(arguments(workdir, **TWO), tmp_path)
    try:
        wait_for((workdir / "metrics.jsonl").exists)
        if TERM in signals:
            _second_is_refused(arguments(workdir, **NO_REPORT), workdir, pair[0].pid, capfd)
        for process, number in zip(pair, signals, strict=True):
            if number:
                process.send_signal(number)
        ended, _, seconds = end(pair)
    finally:
        for process in pair:
            process.kill()
    said = [(tmp_path / f"{index}.txt").read_text() for index in range(2)]
    assert ended == codes, said
    assert seconds < limit
    if KILL not in signals:
        (step,) = _steps(workdir)
        name = "SIGTERM" if TERM in signals else "SIGINT"
        assert step > 1 and f"{name}: saved step {step} in {workdir / 'checkpoints'}" in said[0]
        assert json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())["step"] == step
    else:
        reason = "process 1 of 2 gave no sign of life for 4 s" if codes[0] == 75 else "process 0 of 2, which coordinate"
        other = codes.index(75)
        assert f"process {other} stops: {reason}" in said[other] and "(exit code 75)" in said[other]


@pytest.mark.slow
@pytest.mark.usefixtures("no_end")
def test_a_checkpoint_that_was_cut_off_is_not_restored_and_the_run_goes_on_bit_for_bit(
    trained, tmp_path, arguments, capfd
):
    workdir = tmp_path / "run"
    argv = arguments(workdir, **NO_REPORT, **BOTH_BLOCKS, checkpoint_every=2)
    line = [sys.executable, "-m", "benchmarks.fault_child", "save-items:4", "--", *argv[1:], "--config.mesh.fsdp=1"]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    killed = subprocess.run(line, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, timeout=200)
    assert killed.returncode == -9, killed.stderr
    left = [p.name for p in (workdir / "checkpoints").iterdir() if p.name.startswith("4")]
    assert left and left != ["4"] and _steps(workdir) == [2]
    assert train.main(argv) == 0
    assert "resuming at step 2" in capfd.readouterr().err
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir() if p.name[0].isdigit()) == ["2", "4"]
    whole, resumed = _state(trained, 4), _state(workdir, 4)
    assert all(np.array_equal(resumed[path], value) for path, value in whole.items())


@pytest.mark.slow
def test_a_spike_is_skipped_counted_and_bounded(tmp_path, arguments, monkeypatch, capfd):
    real, calls, large = loop.to_global, [], {4, 6, 7}

    def changed(tree, *args):
        calls.append(1)
        return real(fault_child.spike(tree) if len(calls) in large else tree, *args)

    monkeypatch.setattr(loop, "to_global", changed)
    rule = {"spikes.factor": 3.0, "spikes.after": 2, "max_skipped": 1}
    with pytest.raises(SystemExit) as stop:
        cli.run(train.main, arguments(tmp_path / "run", **NO_REPORT, **rule, steps=8, checkpoint_every=5))
    assert stop.value.code == 1
    error = capfd.readouterr().err
    assert "step 4 was skipped: 1 in all, 1 of them spikes" in error
    assert "error: step 7: loss" in error and "a spike (spikes.factor 3), 2 steps in a row (max_skipped 1)" in error
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [rows[step]["spikes"] for step in (3, 4, 5, 6)] == [0, 1, 1, 2]
    assert [rows[step]["skipped_total"] for step in (3, 4, 5, 6)] == [0, 1, 1, 2]
    meta = json.loads((tmp_path / "run" / "checkpoints" / "5" / "meta" / "metadata").read_text())
    assert meta["counters"]["spikes"]["spikes"] == 1 and meta["counters"]["spikes"]["seen"] == 4


@pytest.mark.slow
@pytest.mark.usefixtures("no_end")
def test_a_run_outlives_a_save_that_fails_and_an_unsaved_end_is_an_error(tmp_path, arguments, monkeypatch, capfd):
    monkeypatch.setattr(checkpoint, "PAUSE_SECONDS", 0.01)
    real = checkpoint._check_storage
    broken = {2}

    def fails(folder, items):
        if calls[-1] in broken:
            raise OSError(30, "Read-only file system")
        return real(folder, items)

    start, calls = Checkpoints._start, []

    def starting(self, step, *args):
        calls.append(step)
        return start(self, step, *args)

    monkeypatch.setattr(checkpoint, "_check_storage", fails)
    monkeypatch.setattr(Checkpoints, "_start", starting)
    argv = arguments(tmp_path / "run", **NO_REPORT, checkpoint_every=1, save_attempts=2, keep=1)
    assert train.main(argv) == 0
    error = capfd.readouterr().err
    assert "failed: [Errno 30] Read-only file system" in error and "no checkpoint of step 2 after 2 attempts" in error
    assert calls == [1, 2, 2, 3, 4] and _steps(tmp_path / "run") == [4]
    broken.add(6)
    with pytest.raises(SystemExit) as stop:
        cli.run(train.main, [argument.replace("--config.steps=4", "--config.steps=6") for argument in argv])
    assert stop.value.code == 1
    error = capfd.readouterr().err
    assert "error: the checkpoint of step 6 could not be written" in error and "that of step 5" in error
    assert _steps(tmp_path / "run") == [5]


@pytest.mark.slow
@pytest.mark.usefixtures("no_end")
def test_what_a_run_does_is_watched(tmp_path, arguments, monkeypatch):
    seen = []

    class Noting(Watchdog):
        def beat(self, doing, slow=False):
            seen.append((doing, slow))

    monkeypatch.setattr(session, "Watchdog", Noting)
    assert train.main(arguments(tmp_path / "run", steps=3, checkpoint_every=2, model__remat="auto")) == 0
    start = [("the start", True), ("choosing model.remat", True)]
    named = [("step 1", True), ("step 2", False), ("saving at step 2", True), ("step 3", False)]
    assert seen == [*start, *named, ("saving at step 3", True)]
