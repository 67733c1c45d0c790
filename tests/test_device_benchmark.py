"""One command for the day a GPU is there: parts under limits of time, whose figures are kept whatever happens."""

import argparse
import dataclasses
import json
import shutil
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from benchmarks import device, device_parts
from benchmarks.device import PARTS, Report, main, run_part
from benchmarks.device_parts import TINY

NO_OPTIONS = argparse.Namespace()


def _part(tmp_path, code, limit=60.0):
    """Outcome and rows of a part that runs some Python."""
    rows = []
    return run_part([sys.executable, "-c", code], limit, rows.append, tmp_path / "log"), rows


def test_rows_come_and_other_lines_are_left_out(tmp_path):
    code = """print('{"ms": 1}'); print("loading"); print('{"ms": 2}')"""
    assert _part(tmp_path, code) == ("done", [{"ms": 1}, {"ms": 2}])


def test_a_part_that_hangs_is_cut_off_with_all_it_started_and_its_rows_are_kept(tmp_path):
    code = """
import subprocess, sys, time
print('{"ms": 1}', flush=True)
subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])
"""
    begin = time.monotonic()
    assert _part(tmp_path, code, limit=1.5) == ("cut off after 2 s", [{"ms": 1}])
    assert time.monotonic() - begin < 20  # the grandchild holds the same pipe


def test_a_part_that_fails_says_why_and_its_rows_are_kept(tmp_path):
    outcome, rows = _part(tmp_path, """print('{"ms": 1}', flush=True); raise ValueError("no such kernel")""")
    assert outcome == "failed: ValueError: no such kernel (see log)" and rows == [{"ms": 1}]


def test_a_part_may_be_skipped_with_a_reason(tmp_path):
    assert _part(tmp_path, """print('{"skipped": "no images"}')""") == ("skipped: no images", [])


def test_both_files_are_whole_after_every_row(tmp_path):
    report = Report(tmp_path, "python -m benchmarks.device")
    code = """print('{"a": 1}'); print('{"a": 2, "b": "x"}')"""
    report.add("one", [sys.executable, "-c", code], 60.0)
    report.add("two", ["never started"], 3.0)
    record = json.loads((tmp_path / "device.json").read_text())
    assert [part["outcome"] for part in record["parts"]] == ["done", "not started: no time was left"]
    assert record["parts"][0]["rows"] == [{"a": 1}, {"a": 2, "b": "x"}]
    table = (tmp_path / "device.md").read_text()
    assert "| a | b |" in table and "| 1 |   |" in table and "| 2 | x |" in table and "## two" in table


def test_the_parts_of_the_command_are_those_that_there_are():
    assert list(PARTS) == list(device_parts.PARTS)


def test_the_command_runs_its_parts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr(device, "run_part", lambda command, *_: started.append(command) or "done")
    assert main(["device", "--tiny", "--out=out"]) == 0
    assert [command[3] for command in started] == list(PARTS) and all("--tiny" in command for command in started)
    monkeypatch.setattr(device, "run_part", lambda *_: "failed: why")
    assert main(["device", "--parts=device", "--out=out"]) == 1
    for argv, line in ((["--parts=all"], "there is no all"), (["--minutes=0"], "must be positive")):
        with pytest.raises(SystemExit):
            main(["device", *argv])
        assert line in capsys.readouterr().err


def test_attention_is_compared_with_float32_and_timed():
    rows = list(device_parts.attention(TINY, NO_OPTIONS))
    assert [row["tokens"] for row in rows] == [512, 528] and {row["backend"] for row in rows} == {"xla"}
    for row in rows:
        assert 0 < float(row["off"]) < 0.01 and 0 < float(row["gradients off"]) < 0.01
        assert float(row["forward, ms"]) > 0 and float(row["forward, TFLOP/s"]) > 0


def test_attention_that_is_off_fails_after_its_row(monkeypatch):
    right = device_parts.attend
    wrong = lambda q, k, v, backend: right(q, k, v, backend) * (1.1 if q.dtype == jnp.bfloat16 else 1)
    monkeypatch.setattr(device_parts, "attend", wrong)
    monkeypatch.setattr(device_parts, "_seconds", lambda *_: 1.0)
    rows = []
    with pytest.raises(AssertionError, match=r"attention is further than 0\.02 from float32: xla at 512 tokens: 0\.1"):
        rows.extend(device_parts.attention(TINY, NO_OPTIONS))


def test_products_are_timed_in_both_dtypes(monkeypatch):
    monkeypatch.setattr(device_parts, "_seconds", lambda f, *args: jax.block_until_ready(f(*args)) is None or 1e-3)
    rows = list(device_parts.products(TINY, NO_OPTIONS))
    assert len(rows) == 10 and {row["dtype"] for row in rows} == {"bf16", "f8"}
    assert rows[0]["shape"] == "2048 x 64 x 192" and rows[0]["TFLOP/s"] == f"{2 * 2048 * 64 * 192 / 1e-3 / 1e12:.3g}"


@pytest.mark.slow
def test_a_train_step_of_a_truncated_stack_runs(one_device):
    shapes = dataclasses.replace(TINY, double=0)  # one kind of block compiles in half the time of two
    row = next(device_parts.steps("flow", shapes, NO_OPTIONS))
    assert (
        (row["remat"], row["products"]) == ("full", shapes.settings().model.compute_dtype)
        and row["rows"] == TINY.rows
        and float(row["ms"]) > 0
    )
    assert 0 < float(row["loss"]) < 10 and float(row["temporaries, GB"]) > 0


@pytest.mark.slow
def test_one_and_four_steps_are_sampled(one_device):
    rows = list(device_parts.sampling(TINY, NO_OPTIONS))
    assert [(row["network"], row["steps"]) for row in rows] == [("truncated", 1), ("truncated", 4)]


def test_a_training_is_told_by_the_row_of_the_slow_ema(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(device_parts, "_run", lambda *_: shutil.copytree(trained, tmp_path / "runs" / "digits"))
    row = next(device_parts.digits(TINY, argparse.Namespace(out=tmp_path)))
    assert row["run"] == "digits" and row.keys() >= {"seconds", "1 step", "2 steps"}
    assert "/" in row["1 step"]


def test_without_the_images_the_emoji_are_skipped(tmp_path):
    (row,) = device_parts.emoji64(TINY, argparse.Namespace(emoji=tmp_path / "none", out=tmp_path))
    assert row == {"skipped": f"{tmp_path / 'none'} is not there (--emoji)"}


def test_a_command_that_fails_ends_its_part_with_its_own_line(tmp_path):
    command = [
        sys.executable,
        "-c",
        "from benchmarks import device_parts as p; p._run('train', ['--config=nowhere.py'])",
    ]
    outcome = run_part(command, 60.0, lambda row: None, tmp_path / "log")
    assert outcome.startswith("failed: error: ") and "nowhere.py" in outcome
