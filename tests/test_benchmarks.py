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


def _record(method, seed, distance):
    figures = dict.fromkeys(compare_objectives.FIGURES, 0.5) | {"frechet_distance": distance}
    return {"method": method, "seed": seed, "cells": [{"steps": n, **figures} for n in compare_objectives.STEPS]}


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
