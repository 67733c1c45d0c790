"""Benchmarks: the settings of every method are settings of a run, and tables hold what the files of runs hold."""

import json
from pathlib import Path

import pytest

from benchmarks import compare_objectives
from shortcut_jax.config_file import load_config
from shortcut_jax.resolve import from_config


@pytest.mark.parametrize("method", compare_objectives.METHODS)
@pytest.mark.parametrize("name", compare_objectives.SETS)
def test_every_method_changes_what_its_name_says(name, method):
    changes = {key: str(value) for key, value in compare_objectives.METHODS[method].items()}
    settings = from_config(load_config(Path(compare_objectives.SETS[name]), changes))
    assert settings.objective == method.split("-")[0]
    if method in ("scfm", "shortcut"):
        assert (settings.one_step_share, settings.jumps, settings.timestep_range) == (0.82, 4, (0.0, 0.9))


FIGURES = dict.fromkeys(compare_objectives.FIGURES, 0.5) | {"images": 10}
CELLS = [{"steps": n, **FIGURES} for n in compare_objectives.STEPS]


def _record(method, seed, distance):
    return {"method": method, "seed": seed, "cells": [cell | {"frechet_distance": distance} for cell in CELLS]}


def test_a_table_has_means_and_ranges_of_the_seeds_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_objectives, "RESULTS", tmp_path)
    for record in (_record("scfm", 0, 1.0), _record("scfm", 1, 2.0), _record("flow", 0, 4.0)):
        path = compare_objectives.result_path("digits", record["method"], 10, record["seed"])
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record))
    compare_objectives.result_path("digits", "flow", 20, 0).write_text(json.dumps(_record("flow", 0, 8.0)))
    lines = compare_objectives.table(compare_objectives.read("digits", 10)).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert ["scfm, 2 seeds", "frechet_distance", *["1.500 [1.000, 2.000]"] * 6] in cells
    assert ["flow, 1 seed", "frechet_distance", *["4.000 [4.000, 4.000]"] * 6] in cells


def test_runs_that_have_their_file_are_not_made_again(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(compare_objectives, "RESULTS", tmp_path)
    path = compare_objectives.result_path("digits", "flow", 1000, 0)
    path.parent.mkdir()
    path.write_text(json.dumps(_record("flow", 0, 4.0)))
    monkeypatch.setattr(compare_objectives.subprocess, "run", lambda *args, **kwargs: pytest.fail("a run was made"))
    assert compare_objectives.main(["compare_objectives", "--methods=flow", "--seeds=0"]) == 0
    out, err = capfd.readouterr()
    assert "flow, 1 seed" in out and "1000-flow-seed0.json is there" in err
    with pytest.raises(compare_objectives.command.UsageError, match="no method 'magic'"):
        compare_objectives.main(["compare_objectives", "--methods=magic"])
    with pytest.raises(compare_objectives.command.UsageError, match="--vary=jumps is not FIELD=VALUE"):
        compare_objectives.main(["compare_objectives", "--vary=jumps"])


def test_a_variant_is_a_run_and_a_row_of_its_own(tmp_path, monkeypatch, capsys):
    commands = []

    def made(command, check):
        commands.append(command)
        (workdir,) = (Path(flag.partition("=")[2]) for flag in command if flag.startswith("--workdir="))
        (workdir / "evaluation").mkdir(parents=True, exist_ok=True)
        (workdir / "evaluation" / "evaluation.json").write_text(json.dumps({"facts": {}, "cells": CELLS}))

    monkeypatch.setattr(compare_objectives, "RESULTS", tmp_path)
    monkeypatch.setattr(compare_objectives.subprocess, "run", made)
    flags = ["--methods=scfm", "--seeds=100", f"--runs={tmp_path / 'runs'}"]
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
