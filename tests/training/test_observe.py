"""What an outside watcher sees of a whole run: heartbeat, logs, profile, the parts of a step's time, goodput."""

import gzip
import json
import re
import shutil
import time

import numpy as np
import pytest

from shortcut_jax import cli, train
from shortcut_jax.cluster.goodput import account
from shortcut_jax.cluster.json_lines import read_lines
from shortcut_jax.errors import CheckpointError, TrainingError
from shortcut_jax.runtime.metrics import read_metrics
from shortcut_jax.training import loop
from tests.helpers import BOTH_BLOCKS
from tests.training.test_train import _with_nan_at

pytestmark = pytest.mark.usefixtures("one_device")
NO_REPORT = {"eval__views": "()", "eval__images": "()"}


def _beat(workdir):
    return json.loads((workdir / "heartbeat.json").read_text())


def _log(workdir):
    return (workdir / "logs" / "process_00000.log").read_text()


def test_a_finished_run_says_so_and_where_its_time_went(trained):
    beat = _beat(trained)
    assert (beat["step"], beat["steps"], beat["state"]) == (4, 4, "finished")
    assert np.isfinite(beat["loss"]) and beat["images_per_second"] > 0
    log = _log(trained)
    for words in (
        "INFO compiling, step 0",
        "INFO saved step 4 in",
        "INFO judging the samples",
        "INFO finished at step 4",
    ):
        assert words in log
    report = (trained / "report.md").read_text()
    line = r"goodput (\d+\.\d)%: (.*) of .* in training steps that were kept, 1 session"
    (told, kept), (reported, kept_by_then) = (re.search(line, text).groups() for text in (log, report))
    for text in (log, report):
        for row in ("compiling steps", "judging and reporting", "all steps: "):
            assert row in text
    assert kept == kept_by_then and 0 < float(told) <= float(reported)  # the report is written a moment before the end
    whole = account(read_lines(trained / "goodput.jsonl"))
    assert whole.sessions == 1 and whole.others["compiling"] > 0 and 0 < whole.goodput < 0.9
    assert whole.wall == pytest.approx(sum(beat["seconds"].values()), abs=0.1)


@pytest.mark.slow
def test_the_parts_of_a_step_are_its_wall_time_and_slow_data_are_seen(tmp_path, arguments, no_end, monkeypatch):
    to_global, record, read = loop.to_global, loop.record, {}

    def slow(*args):
        time.sleep(0.15)
        return to_global(*args)

    def timed(step, *args):
        record(step, *args)
        read[step] = time.perf_counter()

    monkeypatch.setattr(loop, "to_global", slow)
    monkeypatch.setattr(loop, "record", timed)
    assert train.main(arguments(tmp_path / "run", steps=9, log_every=7, **NO_REPORT)) == 0
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[7]
    parts = [row[f"time/{part}"] for part in ("data", "host", "device")]
    assert 0.15 <= parts[0] < 0.25 and parts[0] > max(parts[1:])
    assert sum(parts) == pytest.approx((read[7] - read[1]) / 6, rel=0.1)
    assert row["images_per_second"] == pytest.approx(32 / sum(parts))


def _unless_stopped(save):
    """The last state of a run that stops cannot be saved."""

    def failing(*args, stopped=0, **options):
        if stopped:
            raise CheckpointError("no space is left")
        return save(*args, **options)

    return failing


@pytest.mark.slow
def test_a_run_that_failed_and_was_resumed_tells_what_it_lost(tmp_path, arguments, no_end, monkeypatch, capfd):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        _with_nan_at(patch, {4})
        patch.setattr(loop, "save", _unless_stopped(loop.save))
        with pytest.raises(TrainingError):
            train.main(arguments(workdir, checkpoint_every=2, **NO_REPORT))
    assert (_beat(workdir)["state"], _beat(workdir)["step"]) == ("failed", 4)
    assert "ERROR TrainingError: step 4: loss nan" in _log(workdir) and "Traceback" in _log(workdir)
    capfd.readouterr()
    assert train.main(arguments(workdir, checkpoint_every=2, **NO_REPORT)) == 0
    err = capfd.readouterr().err
    assert "2 sessions" in err and "steps lost and repeated" in err and "between sessions" in err
    whole = account(read_lines(workdir / "goodput.jsonl"))
    assert whole.sessions == 2 and whole.lost > 0 and whole.skipped > 0 and whole.others["restoring"] > 0
    assert whole.down > 0 and whole.kept > 0
    assert "INFO resuming" not in _log(workdir) and "resuming at step 2" in _log(workdir)


def test_a_run_that_was_stopped_is_not_finished(tmp_path, arguments, capfd):
    workdir = tmp_path / "run"
    assert train.main(arguments(workdir, "--stop_at=1")) == 0
    assert _beat(workdir)["state"] == "stopped" and "goodput" in capfd.readouterr().err


@pytest.mark.slow
def test_a_window_of_a_resumed_run_is_profiled_for_tensorboard_and_perfetto(
    trained, tmp_path, arguments, no_end, capfd
):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    assert train.main(arguments(workdir, steps=8, profile_steps="6:8", **NO_REPORT, **BOTH_BLOCKS)) == 0
    assert f"profile of steps 6 to 7 in {workdir / 'profile' / 'process_00000'}" in capfd.readouterr().err
    (folder,) = (workdir / "profile" / "process_00000" / "plugins" / "profile").iterdir()
    assert list(folder.glob("*.xplane.pb"))
    events = json.loads(gzip.decompress((folder / "perfetto_trace.json.gz").read_bytes()))["traceEvents"]
    assert {e["args"]["step_num"] for e in events if e.get("name") == "train" and "args" in e} == {"6", "7"}
    last = read_lines(workdir / "goodput.jsonl")[-1]
    assert last["seconds"]["profiling"] > 0


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"profile_steps": "ten"}, r"profile_steps is 'ten', but must be FIRST:END, such as 10:13"),
        ({"profile_steps": "3:3"}, r"profile_steps is '3:3', but must be FIRST:END with 1 <= FIRST < END"),
        ({"profile_steps": "3:6"}, r"profile_steps is '3:6', but the run has 4 steps: END is at most 5"),
        ({"heartbeat_every": 0}, r"heartbeat_every is 0.0, but must be positive"),
    ],
)
def test_bad_values_are_one_clear_line_before_anything_is_written(changes, pattern, tmp_path, arguments, capfd):
    with pytest.raises(SystemExit):
        cli.run(train.main, arguments(tmp_path / "run", **changes))
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(pattern, error), error
    assert not (tmp_path / "run").exists()
