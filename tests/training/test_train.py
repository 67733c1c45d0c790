import json
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from shortcut_jax import Pipeline, cli, train
from shortcut_jax.cluster.claim import CLAIM, Claim, Times
from shortcut_jax.config.checks import from_config
from shortcut_jax.config.schema import to_dict
from shortcut_jax.core.tree import flat_paths
from shortcut_jax.errors import ConfigError
from shortcut_jax.run.workdir import check_workdir, keep_batch
from shortcut_jax.runtime.checkpoint import Checkpoints
from shortcut_jax.steps.state import to_items
from shortcut_jax.training import loop, session
from tests.helpers import BOTH_BLOCKS, relative, tiny_assembly, tiny_config
from tests.processes import start

ALL_DEVICES = jax.devices()
pytestmark = pytest.mark.usefixtures("one_device")


def _restored(workdir, step, **blocks):
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    shapes = to_items(tiny_assembly(student_steps=(1, 2, 4), **blocks).state_shapes)
    return flat_paths(checkpoints.restore(step, shapes)), checkpoints.meta(step)


def _listing(folder):
    return {str(p): p.stat().st_mtime_ns for p in sorted(folder.rglob("*"))}


def _fails(capfd, argv):
    """Runs a main that has to fail in one line; returns the line."""
    with pytest.raises(SystemExit) as stop:
        cli.run(train.main, argv)
    assert stop.value.code == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def test_a_run_leaves_a_report_images_metrics_and_a_record(trained):
    report = (trained / "report.md").read_text()
    for view in ("online", "fast", "slow"):
        assert f"| {view} (20)" in report
    assert "| 1 step " in report and "| 2 steps" in report and "±" in report
    for name in ("samples/step_00000004.png", "loss.png", "config.json", "shardings.txt"):
        assert (trained / name).stat().st_size > 100, name
    assert any((trained / "tensorboard").iterdir())
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert len({row["loss"] for row in rows}) == 4 and all(np.isfinite(row["loss"]) for row in rows)
    assert "images_per_second" in rows[-1] and "model_flops_per_second" in rows[-1]
    items, meta = _restored(trained, 4, **BOTH_BLOCKS)
    assert meta["counters"] == {"step": 4, "skipped": 0, "skipped_total": 0} and meta["seed"] == 0
    assert all(np.isfinite(v).all() for v in items.values())


@pytest.mark.slow
def test_two_and_two_steps_equal_four_bit_for_bit(trained, tmp_path, arguments, capfd):
    workdir = tmp_path / "run"
    assert train.main(arguments(workdir, "--stop_at=2", **BOTH_BLOCKS)) == 0
    assert not (workdir / "report.md").exists()
    assert train.main(arguments(workdir, **BOTH_BLOCKS, eval__views="()", eval__images="()")) == 0
    assert "resuming at step 2" in capfd.readouterr().err
    whole, resumed = (_restored(folder, 4, **BOTH_BLOCKS)[0] for folder in (trained, workdir))
    assert {"params", "fast", "slow", "optimizer"} == {path.split("/")[0] for path in whole}
    for path, value in whole.items():
        np.testing.assert_array_equal(resumed[path], value, err_msg=path)


def test_a_finished_run_is_not_trained_again(trained, tmp_path, arguments, capfd):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    assert train.main(arguments(workdir, **BOTH_BLOCKS, eval__views="()", eval__images="()")) == 0
    assert "resuming at step 4" in capfd.readouterr().err
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == 4


def test_another_identity_stops_naming_fields_and_values_and_harms_nothing(trained, arguments, capfd):
    before = _listing(trained)
    argv = arguments(trained, **BOTH_BLOCKS, objective="flow", seed=5, batch_size=64, optimizer__learning_rate=0.5)
    error = _fails(capfd, argv)
    for part in ("objective: 'scfm' -> 'flow'", "seed: 0 -> 5", "batch_size: 32 -> 64", "learning_rate: 0.02 -> 0.5"):
        assert part in error
    assert _listing(trained) == before


def test_a_second_run_in_a_workdir_is_refused_and_touches_nothing_of_the_first(trained, tmp_path, arguments, capfd):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    with Claim(workdir, times=Times(interval=0.05)) as first:
        first.take()
        before = {path: when for path, when in _listing(workdir).items() if path != str(first.path)}
        error = _fails(capfd, arguments(workdir, **BOTH_BLOCKS, steps=6))
        assert f"{workdir} is in use by process {os.getpid()} on " in error and "another --workdir" in error
        assert {path: when for path, when in _listing(workdir).items() if path != str(first.path)} == before


@pytest.mark.slow
def test_a_longer_schedule_goes_on_and_is_logged(tmp_path, arguments, capfd):
    workdir = tmp_path / "run"
    assert train.main(arguments(workdir, eval__views="()", eval__images="()")) == 0
    capfd.readouterr()
    assert train.main(arguments(workdir, "--stop_at=5", steps=6, log_every=2)) == 0
    err = capfd.readouterr().err
    assert "changed since the last run: steps: 4 -> 6" in err and "log_every" not in err
    assert not (workdir / CLAIM).exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_says_where_and_exits(number, code, tmp_path, arguments, capfd, monkeypatch):
    real = loop.to_global
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:  # the batch of step 3 is placed while step 2 runs
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(loop, "to_global", interrupted)
    assert train.main(arguments(tmp_path / "run")) == code
    assert f"{number.name}: saved step 2 in {tmp_path / 'run' / 'checkpoints'}" in capfd.readouterr().err
    assert Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps() == [2]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_before_the_first_step_says_that_nothing_was_to_be_saved(
    number, code, trained, tmp_path, arguments, capfd, monkeypatch
):
    real = session.restore_or_init

    def interrupted(*args):
        os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(session, "restore_or_init", interrupted)
    assert train.main(arguments(tmp_path / "fresh")) == code
    assert f"{number.name}: nothing new was to be saved in {tmp_path / 'fresh'}" in capfd.readouterr().err
    assert Checkpoints(tmp_path / "fresh" / "checkpoints", read_only=True).steps() == []
    shutil.copytree(trained, tmp_path / "old")
    assert train.main(arguments(tmp_path / "old", **BOTH_BLOCKS, steps=6)) == code
    assert f"{number.name}: nothing new was to be saved after step 4 in" in capfd.readouterr().err


def test_a_signal_while_judging_is_acted_on(tmp_path, arguments, capfd, monkeypatch):
    monkeypatch.setattr(session, "judge", lambda *args: (os.kill(os.getpid(), signal.SIGTERM), args[-1]("one cell")))
    assert train.main(arguments(tmp_path / "run")) == 75
    assert "SIGTERM: saved step 4" in capfd.readouterr().err
    assert not (tmp_path / "run" / "report.md").exists()


def test_a_run_on_ten_images_is_judged_by_the_whole_set(tmp_path, arguments, monkeypatch):
    judged_by = []
    monkeypatch.setattr(session, "reference_of", lambda data: judged_by.append(len(data.captions(5000))) or "not here")
    assert train.main(arguments(tmp_path / "run", steps=1, data__limit=10)) == 0
    assert judged_by == [1797]


def _per_device_config(folder, rows):
    """The digits with the rows of a device in place of the global batch."""
    config = folder / "per_device.py"
    config.write_text(
        "import runpy\n\n\n"
        "def get_config():\n    c = runpy.run_path('configs/digits.py')['get_config']()\n"
        f"    with c.ignore_type():\n        c.batch_size, c.batch_per_device = None, {rows}\n    return c\n"
    )
    return config


def _without_batch(argv, config):
    return ["train", f"--config={config}", *(flag for flag in argv[2:] if "batch_size=32" not in flag)]


def test_rows_a_device_become_the_global_batch_that_is_stored(tmp_path, arguments, capfd):
    flags = arguments(tmp_path / "run", eval__views="()", eval__images="()", mesh__fsdp=1)
    argv = _without_batch(flags, _per_device_config(tmp_path, 32))
    assert train.main([*argv, "--stop_at=1"]) == 0
    assert train.main([*argv, "--stop_at=2"]) == 0
    pipeline = Pipeline(tmp_path / "run")
    assert pipeline.step == 2
    assert (pipeline.settings.batch_size, pipeline.settings.batch_per_device) == (32, None)
    # Other rows a device than the run was started with are another run, also where there are more devices.
    error = _fails(capfd, [*_without_batch(flags, _per_device_config(tmp_path, 16)), "--stop_at=3"])
    assert "batch_size: 32 -> 16" in error


@pytest.mark.parametrize(
    ("devices", "changes", "error"),
    [
        (2, {}, None),
        (3, {}, r"global batch of 32 rows, which does not divide over 3 shards .*data x \.fsdp to one of 1, 2, 4, 8"),
        (16, {}, r"does not divide over 16 shards .* groups of 4 rows: set --config\.mesh\.data x \.fsdp to one of"),
        (8, {"accumulate": 2}, r"8 shards \(data x fsdp\) x 2 micro-batches .* to one of 1, 2, 4$"),
    ],
)
def test_the_global_batch_of_a_workdir_stays_on_other_devices(devices, changes, error, tmp_path, capfd):
    """Started with 8 rows on each of 4 devices."""
    stored = {**to_dict(tiny_assembly(1).settings), "batch_size": 32}
    for batch in ({"batch_size": None, "batch_per_device": 8}, {"batch_size": 32}):
        folder = tmp_path / "run" / "checkpoints" / "1" / "meta"
        folder.mkdir(parents=True, exist_ok=True)
        meta = {"format_version": 1, "config": stored, "batch_shards": 4}
        (folder / "metadata").write_text(json.dumps(meta))
        settings = from_config(tiny_config(mesh__fsdp=-1, **batch, **changes))
        if error:
            with pytest.raises(ConfigError, match=error):
                keep_batch(settings, tmp_path / "run", devices)
            continue
        kept = keep_batch(settings, tmp_path / "run", devices)
        assert (kept.batch_size, kept.batch_per_device) == (32, None)
        assert ("stays 32 rows" in capfd.readouterr().err) == ("batch_per_device" in batch)
        # What the run was not started with is left for `check_workdir` to refuse.
        other = from_config(tiny_config(mesh__fsdp=-1, batch_size=None, batch_per_device=12))
        assert keep_batch(other, tmp_path / "run", devices) == other
        assert keep_batch(settings, tmp_path / "elsewhere", devices) == settings


def _with_nan_at(monkeypatch, steps):
    real = loop.to_global
    calls = []

    def broken(tree, *args):
        calls.append(1)
        if len(calls) in steps:
            tree = tree._replace(latents_BhwC=np.full_like(tree.latents_BhwC, np.nan))
        return real(tree, *args)

    monkeypatch.setattr(loop, "to_global", broken)


def test_a_non_finite_step_stops_the_run_and_names_itself(tmp_path, arguments, monkeypatch, capfd):
    _with_nan_at(monkeypatch, {3})
    argv = arguments(tmp_path / "run", checkpoint_every=2)
    error = _fails(capfd, argv)
    assert "step 3: loss nan" in error and "max_skipped 0" in error
    assert (
        f"saved step 4 in {tmp_path / 'run' / 'checkpoints'}: to resume after them, set --config.max_skipped=1" in error
    )
    items, meta = _restored(tmp_path / "run", 4)  # step 4 was under way, and is finite
    assert meta["counters"]["step"] == 4 and meta["counters"]["skipped_total"] == meta["stopped"] == 1
    assert all(np.isfinite(v).all() for v in items.values())
    error = _fails(capfd, argv)
    assert "stopped at step 4 after 1 skipped steps in a row" in error and "and would again: to resume" in error
    assert Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps() == [2, 4]


def test_more_non_finite_steps_in_a_row_than_are_borne_stop_the_run(tmp_path, arguments, monkeypatch, capfd):
    _with_nan_at(monkeypatch, {1, 3, 4})
    error = _fails(capfd, arguments(tmp_path / "run", max_skipped=1, steps=6))
    assert "step 4" in error and "2 steps in a row (max_skipped 1)" in error and "--config.max_skipped=2" in error
    items, meta = _restored(tmp_path / "run", 5)
    assert all(np.isfinite(v).all() for v in items.values()) and meta["counters"]["skipped_total"] == 3
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    with pytest.raises(ConfigError, match="stopped at step 5 after 2 skipped steps in a row"):
        check_workdir(tmp_path / "run", config)
    check_workdir(tmp_path / "run", config | {"max_skipped": 2})
    check_workdir(tmp_path / "run", config | {"spikes": config["spikes"] | {"factor": 5.0}})


def test_a_borne_non_finite_step_is_counted_and_leaves_finite_weights(tmp_path, arguments, monkeypatch):
    _with_nan_at(monkeypatch, {2})
    assert train.main(arguments(tmp_path / "run", max_skipped=1, eval__views="()", eval__images="()")) == 0
    items, meta = _restored(tmp_path / "run", 4)
    assert meta["counters"] == {"step": 4, "skipped": 0, "skipped_total": 1}
    assert all(np.isfinite(v).all() for v in items.values())


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_falls_back(trained, tmp_path, arguments, capfd):
    workdir = tmp_path / "run"
    assert train.main(arguments(workdir, "--stop_at=3", **BOTH_BLOCKS, checkpoint_every=2)) == 0
    shutil.rmtree(workdir / "checkpoints" / "3" / "optimizer")
    assert train.main(arguments(workdir, **BOTH_BLOCKS, eval__views="()", eval__images="()")) == 0
    err = capfd.readouterr().err
    assert "step 3" in err and "is damaged: falling back" in err and "resuming at step 2" in err
    whole, resumed = (_restored(folder, 4, **BOTH_BLOCKS)[0] for folder in (trained, workdir))
    assert all(np.array_equal(resumed[path], value) for path, value in whole.items())


BAD = {
    "unknown key": ({"stepz": 3}, r"stepz"),
    "unknown nested key": ({"optimizer.lr": 3}, r"lr"),
    "unknown objective": ({"objective": "magic"}, r"objective is 'magic', but must be one of flow, scfm, shortcut"),
    "unknown preset": ({"model.preset": "huge"}, r"no preset 'huge'.*flux-schnell"),
    "wrong type": ({"steps": "many"}, r"steps"),
    "no steps": ({"steps": 0}, r"steps is 0"),
    "step counts": ({"student_steps": "(0,2)"}, r"student_steps is \(0, 2\)"),
    "eval counts": ({"eval.steps": "(1,0)"}, r"eval.steps is \(1, 0\)"),
    "weights": ({"student_weights": "(1.0,2.0)"}, r"student_weights has 2 entries for 3"),
    "weights and a share": (
        {"student_weights": "(1,1,1)", "one_step_share": 0.5},
        r"student_weights and one_step_share both say how often",
    ),
    "share": ({"one_step_share": 1.5}, r"one_step_share: the share of one step is 1.5"),
    "times": ({"timestep_range": "(0.9,0.5)"}, r"timestep_range is \(0.9, 0.5\), but must be two times"),
    "one time": ({"timestep_range": "(0.9,)"}, r"timestep_range is \(0.9,\), but must be two times"),
    "jumps": ({"jumps": 3}, r"jumps is 3, but must be an even number"),
    "batch": ({"batch_size": 30}, r"global batch of 30 rows.*multiple of 4.*nearest above is 32"),
    "accumulation": ({"accumulate": 3}, r"multiple of 12 = 1 shards \(data x fsdp\) x 3 micro-batches x groups of 4"),
    "mesh": ({"mesh.tensor": 3}, r"mesh data 1 x fsdp 1 x tensor 3 needs 3 devices, but there are 1"),
    "heads": ({"model.heads": 4}, r"head size 8 .*does not match the RoPE axes \(4, 6, 6\)"),
    "width": ({"model.width": 33}, r"width 33 is not a multiple of its 2 heads"),
    "attention": ({"model.attention": "cudnn"}, r"attention 'cudnn' needs an NVIDIA GPU"),
    "timestep": ({"timestep": "cubic"}, r"timestep is 'cubic'"),
    "image size": (
        {"data.width": 16},
        r"'digits' holds images of 8 x 8 pixels, but data.height and data.width are 8 and 16: set --config.data.height",
    ),
    "channels": (
        {"model.preset": "flux-30m"},
        r"images of 1 channels, but the preset 'flux-30m' takes 16: .*digits",
    ),
    "text states": ({"data.text_encoder": "stored"}, r"'pixels' has no stored text states"),
    "data": ({"data.name": "flowers"}, r"'flowers' is not prepared"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line_before_anything_is_written(name, tmp_path, arguments, capfd):
    changes, pattern = BAD[name]
    error = _fails(capfd, arguments(tmp_path / "run", **changes))
    assert re.search(pattern, error), error
    assert not (tmp_path / "run").exists()


def test_bad_command_lines_are_one_clear_line(tmp_path, capfd):
    assert "--config is missing; usage: python -m shortcut_jax.train" in _fails(capfd, ["train"])
    assert "nowhere.py is not found" in _fails(capfd, ["train", "--config=nowhere.py"])
    assert "--unknown" in _fails(capfd, ["train", "--config=configs/digits.py", "--unknown=3"]).replace("'", "--")
    assert "stray" in _fails(capfd, ["train", "--config=configs/digits.py", "stray"])
    file = tmp_path / "file"
    file.write_text("mine")
    error = _fails(capfd, ["train", "--config=configs/digits.py", f"--workdir={file}"])
    assert "is a file, not a folder" in error and file.read_text() == "mine"


def test_the_pod_config_without_its_data_says_what_is_missing_within_seconds():
    argv = [sys.executable, "-m", "shortcut_jax.train", "--config=configs/flux_pretrain.py"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    (error,) = done.stderr.splitlines()
    for part in ("error: ", "cc12m_latents_256", "shortcut_jax.prepare", "configs/digits.py"):
        assert part in error


@pytest.mark.slow
def test_two_processes_equal_one_which_goes_on_from_them(tmp_path, arguments, no_end, monkeypatch, capfd):
    """Two processes of two devices each, over which the weights are split, against one process of four devices.

    Then one of two devices goes on, another mesh.
    """
    common = {"mesh.fsdp": 4, "eval.views": "()", "eval.images": "()", "checkpoint_every": 3}
    per_device = _per_device_config(tmp_path, 8)
    argv = _without_batch(arguments(tmp_path / "two", **common), per_device)
    pair = start(2, ["-m", "shortcut_jax.train", *argv[1:], "--stop_at=3"], devices=2)
    monkeypatch.setattr(jax, "devices", lambda *args: ALL_DEVICES[:4])
    assert train.main(_without_batch(arguments(tmp_path / "one", **common), per_device)) == 0
    for process in pair:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    beats = [
        json.loads((tmp_path / "two" / f).read_text()) for f in ("heartbeat.json", "heartbeats/process_00001.json")
    ]
    assert [(b["process"], b["step"], b["state"]) for b in beats] == [(0, 3, "stopped"), (1, 3, "stopped")]
    logs = [(tmp_path / "two" / "logs" / f"process_0000{n}.log").read_text() for n in range(2)]
    assert all(f"process {n} INFO saved step 3" in log for n, log in enumerate(logs))
    capfd.readouterr()
    monkeypatch.setattr(jax, "devices", lambda *args: ALL_DEVICES[:2])
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    argv = _without_batch(arguments(tmp_path / "two", **common | {"mesh.fsdp": 2}), per_device)
    assert train.main(argv) == 0
    err = capfd.readouterr().err
    assert "resuming at step 3" in err and "mesh data 1 x fsdp 2 x tensor 1" in err
    assert "the global batch stays 32 rows, as the run was started: 16 on each of 2 shards" in err
    assert "arrays are split" in err
    one, two = ([_restored(tmp_path / name, step)[0] for step in (3, 4)] for name in ("one", "two"))
    for path, value in one[0].items():
        np.testing.assert_allclose(two[0][path], value, rtol=1e-4, atol=1e-6, err_msg=path)
    for item in ("params", "fast", "slow"):  # single weights with next to no gradient differ more on another mesh
        pick = lambda step, item=item: [value for path, value in step.items() if path.startswith(f"{item}/")]
        assert relative(pick(two[0]), pick(one[0])) <= 1e-5, item
        assert relative(pick(two[1]), pick(one[1])) <= 1e-5, item
    assert "whole by its rule" in (tmp_path / "two" / "shardings.txt").read_text()


@pytest.mark.slow
def test_a_run_on_captions_alone_trains_and_draws_them(trained, tmp_path, arguments):
    (tmp_path / "prompts.txt").write_text("the digit one\nthe digit two\n")
    rows = {"rows__self_rows": 0, "rows__flow_rows": 0, "rows__rolled_rows": 1, "init_from": str(trained)}
    of = {"data__store": "captions", "data__dir": str(tmp_path), "data__name": "prompts.txt"}
    assert train.main(arguments(tmp_path / "run", steps=2, **BOTH_BLOCKS, **rows, **of)) == 0
    assert "captions alone" in (tmp_path / "run" / "report.md").read_text()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["loss/rolled"] == row["loss"] > 0 for row in rows)
    assert (tmp_path / "run" / "samples" / "step_00000002.png").stat().st_size > 100
