import json
import os
import socket
import time

import jax
import pytest

from shortcut_jax.cluster import heartbeat
from shortcut_jax.cluster.heartbeat import Progress
from shortcut_jax.cluster.json_lines import read_lines
from shortcut_jax.cluster.timing import Stopwatch


def _progress(workdir, step=0, every=1000.0):
    return Progress(workdir, step, 10, Stopwatch("starting"), every)


def _beat(workdir):
    text = (workdir / "heartbeat.json").read_text()
    assert text.count("\n") == 1 and text.endswith("\n")
    return json.loads(text)


def test_a_heartbeat_tells_who_where_and_what(tmp_path):
    progress = _progress(tmp_path)
    assert (_beat(tmp_path)["state"], _beat(tmp_path)["loss"], _beat(tmp_path)["images_per_second"]) == (
        *("starting", None, None),
    )
    with progress.training():
        progress.rate = 55.5
        progress.done(3, skipped=False)
        progress.beat(0.25)
        found = _beat(tmp_path)
    assert {key: found[key] for key in ("step", "steps", "state", "loss", "images_per_second")} == {
        **{"step": 3, "steps": 10, "state": "training", "loss": 0.25, "images_per_second": 55.5},
    }
    assert (found["process"], found["host"], found["pid"]) == (0, socket.gethostname(), os.getpid())
    assert found["session"] <= found["time"]
    assert [path.name for path in tmp_path.glob("heartbeat*")] == ["heartbeat.json"]  # no part of one


def test_what_may_take_long_is_told_at_once_and_steps_when_they_are_due(tmp_path, monkeypatch):
    progress = _progress(tmp_path, every=5.0)
    assert not progress.due
    now = heartbeat.time.monotonic()
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now + 5.1)
    assert progress.due
    with progress.training():
        with progress.doing("compiling"):
            assert _beat(tmp_path)["state"] == "compiling"
        progress.beat(1.0)
        assert _beat(tmp_path)["state"] == "training" and not progress.due
    progress.end("interrupted")
    assert _beat(tmp_path)["state"] == "interrupted"


def test_a_loss_that_is_no_number_is_null(tmp_path):
    _progress(tmp_path).beat(float("nan"))
    assert _beat(tmp_path)["loss"] is None


def test_other_processes_have_files_of_their_own_and_keep_no_ledger(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    _progress(tmp_path).end("finished")
    assert json.loads((tmp_path / "heartbeats" / "process_00003.json").read_text())["process"] == 3
    assert not (tmp_path / "heartbeat.json").exists() and not (tmp_path / "goodput.jsonl").exists()


def test_skipped_steps_are_counted_apart(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(heartbeat.time, "perf_counter", lambda: now[0])
    progress = _progress(tmp_path)
    with progress.training():
        for step, skipped in enumerate((False, True, False), start=1):
            now[0] += step
            progress.done(step, skipped)
    account = progress.account()
    assert (account.kept, account.skipped, account.wall) == (4.0, 2.0, 6.0)


def test_a_killed_session_is_known_by_its_heartbeat(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(heartbeat.time, "perf_counter", lambda: now[0])
    killed = _progress(tmp_path)
    with killed.training():
        now[0] += 10
        killed.done(4, skipped=False)
        killed.note()  # a checkpoint
        now[0] += 3
        killed.done(5, skipped=False)
        killed.beat(0.5)  # and no end
    time.sleep(0.002)  # sessions are known by the millisecond that they start in
    again = _progress(tmp_path, step=4)
    with again.training():
        now[0] += 7
        again.done(6, skipped=False)
        account = again.account()
    assert (account.sessions, account.kept, account.lost) == (2, 17.0, 3.0)
    again.end("finished")
    lines = len(read_lines(tmp_path / "goodput.jsonl"))
    _progress(tmp_path, step=6)  # what has ended by itself is not taken a second time
    assert len(read_lines(tmp_path / "goodput.jsonl")) == lines + 1


@pytest.mark.parametrize("left", ["", "{", "[]", '{"session": 1}', '{"session": 1, "step": 2, "seconds": 3}'])
def test_a_heartbeat_of_another_kind_is_replaced(left, tmp_path):
    (tmp_path / "heartbeat.json").write_text(left)
    progress = _progress(tmp_path)
    assert _beat(tmp_path)["state"] == "starting" and progress.account().sessions == 1


@pytest.mark.parametrize("line", ["{}", "[]", '{"session": 1, "step": 2, "seconds": 3, "state": "x"}', "[" * 100_000])
def test_a_line_of_the_ledger_that_was_edited_is_passed_over(line, tmp_path):
    _progress(tmp_path).end("stopped")
    with (tmp_path / "goodput.jsonl").open("a") as file:
        file.write(line + "\n")
    time.sleep(0.002)
    assert _progress(tmp_path).account().sessions == 2


def test_a_heartbeat_that_cannot_be_written_is_told_once_and_stops_nothing(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(heartbeat.LOGGER, "warning", lambda *args: said.append(args))
    (tmp_path / "heartbeat.json").mkdir()
    (tmp_path / "goodput.jsonl").mkdir()
    progress = _progress(tmp_path)
    progress.beat(1.0)
    progress.end("failed")
    assert sorted(args[1] for args in said) == ["goodput.jsonl", "heartbeat.json"]
