"""Where nothing can be written, or another command writes, each says so in one line, before any long work."""

import os

import pytest

from shortcut_jax import cli, compare, convert, evaluate, prepare, sample, train
from shortcut_jax.cluster.claim import Claim, Times
from shortcut_jax.preparation import inspect, jobs
from shortcut_jax.preparation.jobs import Processes
from tests.data.images import simple_folder

CASES = {
    "train": (train, "assemble_training", ["--config=configs/digits.py", "--workdir={place}"]),
    "prepare": (jobs, "open_source", ["--source=tfds:digits", "--out={place}"]),
    "inspect": (inspect, "PreparedSet", ["--inspect=somewhere", "--out={place}.png"]),
    "evaluate": (evaluate, "open_run", ["--workdir=somewhere", "--out={place}"]),
    "evaluate, its default": (evaluate, "open_run", ["--workdir={place}"]),
    "evaluate, reference": (
        *(evaluate, "open_reference"),
        ["--reference=somewhere", "--features=random", "--save_reference={place}/x.npz"],
    ),
    "convert": (convert, "gather", ["--from=configs", "--to={place}"]),
    "compare": (compare, "RunSubject", ["--workdir=somewhere", "--out={place}/x"]),
    "sample": (sample, "_open", ["--workdir=somewhere", "--prompt=seven", "--out={place}.png"]),
    "sample, folder": (sample, "_open", ["--workdir=somewhere", "--prompt=seven", "--out={place}/"]),
}


@pytest.mark.parametrize("kind", ["/proc", "below a file"])
@pytest.mark.parametrize("name", CASES)
def test_a_place_where_nothing_can_be_written_is_refused_first(name, kind, tmp_path, monkeypatch, capfd):
    module, work, argv = CASES[name]
    monkeypatch.setattr(module, work, lambda *args, **options: pytest.fail("work began"))
    (tmp_path / "file").write_text("mine")
    place = "/proc/x" if kind == "/proc" else str(tmp_path / "file" / "x")
    main = prepare.main if module in (inspect, jobs) else module.main
    with pytest.raises(SystemExit) as stop:
        cli.run(main, ["command", *(part.format(place=place) for part in argv)])
    assert stop.value.code == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and place in line
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_an_evaluation_is_refused_where_another_one_writes(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(evaluate, "open_run", lambda *args: pytest.fail("work began"))
    with Claim(tmp_path, "--out", times=Times(interval=0.02)) as first:
        first.take()
        with pytest.raises(SystemExit):
            cli.run(evaluate.main, ["evaluate", "--workdir=somewhere", f"--out={tmp_path}"])
    error = capfd.readouterr().err
    assert f"error: {tmp_path} is in use by process {os.getpid()} on " in error and "give another --out" in error


def test_a_set_is_refused_where_another_command_makes_it_but_processes_of_one_command_share_it(
    tmp_path, monkeypatch, capfd
):
    source, out = simple_folder(tmp_path / "images", 4), tmp_path / "set"
    argv = ["prepare", f"--source={source}", f"--out={out}", "--resolution=32"]
    monkeypatch.setattr(jobs, "open_source", lambda *args: pytest.fail("work began"))
    with jobs.claim(out, Processes(0, 1), Times(interval=0.02)) as first:
        first.take()
        with pytest.raises(SystemExit):
            cli.run(prepare.main, argv)
        assert not out.exists() and not (tmp_path / ".set.partial").exists()
    error = capfd.readouterr().err
    assert f"error: {out} is in use by process {os.getpid()} on " in error and "give another --out" in error
    with jobs.claim(out, Processes(0, 2)) as one, jobs.claim(out, Processes(1, 2)) as other:
        one.take()
        other.take()
        assert len(list(tmp_path.glob(".set.claim-*"))) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["images"]
