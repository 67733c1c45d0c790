"""Benchmarks: the settings of every method are settings of a run, and tables hold what the files of runs hold."""

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import compare_objectives, objectives_page
from shortcut_jax.config.checks import from_config
from shortcut_jax.config.load import load_config
from shortcut_jax.errors import UsageError


@pytest.mark.parametrize("method", compare_objectives.METHODS)
@pytest.mark.parametrize("name", compare_objectives.SETS)
def test_every_method_changes_what_its_name_says(name, method):
    changes = {key: str(value) for key, value in compare_objectives.METHODS[method].items()}
    run = compare_objectives.Run(name, method, "", 10, 0)
    settings = from_config(load_config(run.config, changes))
    assert settings.objective == ("scfm" if run.distils else method.split("-")[0])
    assert run.distils == (settings.teacher_share > 0)
    if method in ("scfm", "shortcut"):
        assert (settings.jumps, settings.timestep_range) == (4, (0.0, 0.9))
        assert settings.student_weights[:2] == (3.0, 4.0)
        assert settings.multistep_start == {"scfm": 0.99, "shortcut": 1.0}[method]


FIGURES = dict.fromkeys(objectives_page.FIGURES, 0.5) | {"images": 10}
CELLS = [{"steps": n, **FIGURES} for n in objectives_page.STEPS]


def _write(method, seed, distance, steps=1000, change="", folder=None):
    """The files of a run whose distance is the same at each step count, and whose image has one shade."""
    run = compare_objectives.Run("digits", method, change, steps, seed)
    cells = [cell | {"frechet_distance": distance} for cell in CELLS]
    record = {"set": "digits", "method": run.label, "steps": steps, "seed": seed, "cells": cells, "facts": {}}
    record["captions"] = ["the digit one"] * 10
    run.path.parent.mkdir(exist_ok=True)
    run.path.write_text(json.dumps(record | {"command": f"python {method}", "date": "2026-11-26"}))
    Image.new("L", (8 * 10, 8 * len(CELLS)), int(distance * 10)).save(run.path.with_suffix(".png"))


def test_tables_page_and_image_are_those_of_the_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare_objectives, "RESULTS", tmp_path)
    for run in (("scfm", 0, 1.0), ("scfm", 1, 2.0), ("flow", 0, 4.0), ("flow", 1, 4.1), ("scfm", 100, 7.0)):
        _write(*run)
    _write("scfm", 0, 3.0, change="jumps=6")
    _write("flow", 0, 8.0, steps=2000)
    assert compare_objectives.main(["compare_objectives", "--table", f"--out={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    assert ["scfm, 2 seeds", "frechet distance", *["1.500 [1.000, 2.000]"] * 6] in cells
    assert ["scfm, 1 seed", "frechet distance", *["7.000"] * 6] in cells  # of tuning, in a table of its own
    assert ["scfm jumps=6, 1 seed", "frechet distance", *["3.000"] * 6] in cells
    assert "8.000" not in out
    page = (tmp_path / "out" / "digits-1000.html").read_text()
    assert page.count("<td class=best>1.500 <small>± 0.500</small></td>") == 6
    assert "4.050 <small>± 0.050" in page
    assert "python scfm" in page and "<svg" in page and "data:image/png" in page
    with Image.open(tmp_path / "out" / "digits-1000.png") as sheet:
        shades = {shade for count, shade in sheet.convert("L").getcolors(1000) if count > 10_000}
    assert {10, 40} <= shades and not {20, 30, 70} & shades  # the lowest seed of each method, no variant


def test_equal_compute_is_as_many_steps_as_scfm_pays_for():
    steps = lambda method: compare_objectives.equal_steps(compare_objectives.Run("digits", method, "", 1000, 0, True))
    with pytest.raises(UsageError, match="from scratch, which distill does not"):
        steps("distill")
    assert steps("scfm") == 1000 and steps("flow") == 1333  # (3 + 4 / 4) / 3 forward passes a row
    assert (
        compare_objectives.Run("digits", "flow", "", 1000, 0, True).path.name == "1000-flow-at-equal-compute-seed0.json"
    )


def test_runs_that_have_their_file_are_not_made_again(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(compare_objectives, "RESULTS", tmp_path)
    _write("flow", 0, 4.0)
    monkeypatch.setattr(compare_objectives.subprocess, "run", lambda *args, **kwargs: pytest.fail("a run was made"))
    kept = f"--out={tmp_path / 'out'}"
    assert compare_objectives.main(["compare_objectives", "--methods=flow", "--seeds=0", kept]) == 0
    out, err = capfd.readouterr()
    assert "flow, 1 seed" in out and "1000-flow-seed0.json is there" in err
    with pytest.raises(UsageError, match="no method 'magic'"):
        compare_objectives.main(["compare_objectives", "--methods=magic"])
    with pytest.raises(UsageError, match="--vary=jumps is not FIELD=VALUE"):
        compare_objectives.main(["compare_objectives", "--vary=jumps"])


def test_a_variant_is_a_run_and_a_row_of_its_own(tmp_path, monkeypatch, capsys):
    commands = []

    def made(command, check):
        commands.append(command)
        (workdir,) = (Path(flag.partition("=")[2]) for flag in command if flag.startswith("--workdir="))
        (workdir / "evaluation").mkdir(parents=True, exist_ok=True)
        cells = [{"label": label, **cell} for label in ("teacher", "slow") for cell in CELLS]
        (workdir / "evaluation" / "evaluation.json").write_text(json.dumps({"facts": {}, "cells": cells}))

    monkeypatch.setattr(compare_objectives, "RESULTS", tmp_path)
    monkeypatch.setattr(compare_objectives.subprocess, "run", made)
    monkeypatch.setattr(compare_objectives, "draw", lambda workdir, path: ["the digit one"])
    flags = ["--methods=scfm", "--seeds=100", f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}"]
    for varied in ([], ["--vary=jumps=6 ema.slow=0.99"]):
        assert compare_objectives.main(["compare_objectives", *flags, *varied]) == 0
    trained = [" ".join(command) for command in commands if "shortcut_jax.train" in command]
    assert ["--config.jumps=4" in line for line in trained] == [True, False] and "--config.ema.slow=0.99" in trained[1]
    assert {path.name for path in (tmp_path / "digits").iterdir()} == {
        "1000-scfm-seed100.json",
        "1000-scfm-jumps=6-ema.slow=0.99-seed100.json",
    }
    out = capsys.readouterr().out
    assert "scfm jumps=6 ema.slow=0.99, 1 seed" in out and "scfm, 1 seed" in out


def test_a_student_learns_from_the_flow_run_of_its_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_objectives, "RESULTS", tmp_path)
    run = compare_objectives.Run("digits", "distill-rolled", "data.limit=10", 600, 3, teacher_steps=50)
    with pytest.raises(UsageError, match=r"50-flow-seed3, which is not found: make it with"):
        compare_objectives.teacher_of(run, tmp_path)
    (tmp_path / "digits" / "50-flow-seed3" / "checkpoints").mkdir(parents=True)
    assert compare_objectives.teacher_of(run, tmp_path) == tmp_path / "digits" / "50-flow-seed3"
