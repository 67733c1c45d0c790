"""Checkpoints whose JSON somebody edited or damaged, and what else lies among them."""

import copy
import json

import jax.numpy as jnp
import pytest

from shortcut_jax.errors import CheckpointError, ConfigError, UserError
from shortcut_jax.inference.run_pipeline import Pipeline
from shortcut_jax.run.workdir import check_workdir, keep_batch, open_start, record_of, restore_or_init
from shortcut_jax.runtime.checkpoint import ITEMS, Checkpoints, stored_meta
from shortcut_jax.sources import models
from shortcut_jax.training import session
from tests.helpers import tiny_assembly


@pytest.fixture(scope="module")
def assembly():
    return tiny_assembly()


@pytest.fixture(scope="module")
def meta(assembly):
    """What a checkpoint holds as JSON."""
    counters = {"step": 4, "skipped": 0, "skipped_total": 0}
    whole = {"format_version": 1, "step": 4, "seed": 0, "config": record_of(assembly), "batch_shards": 1}
    return json.loads(json.dumps({**whole, "counters": counters, "base": None}))


def _write(workdir, text):
    folder = workdir / "checkpoints" / "4" / "meta"
    folder.mkdir(parents=True)
    (folder / "metadata").write_text(text)


def _one_line(act):
    """Whether an act works, or fails in one line."""
    try:
        act()
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("text", ["", "\0\1", "[]", "3", "{}", "[" * 100_000, '{"config":' * 100_000])
def test_meta_that_is_none_is_passed_over(text, tmp_path, meta):
    _write(tmp_path, text)
    assert stored_meta(tmp_path / "checkpoints") is None
    older = tmp_path / "checkpoints" / "3" / "meta"
    older.mkdir(parents=True)
    (older / "metadata").write_text(json.dumps(meta))
    assert stored_meta(tmp_path / "checkpoints")["step"] == 4


PLACES = ("config", "config.model", "config.lora", "config.steps", "config.batch_size", "config.model.preset")
PLACES += ("config.data", "config.guidance_mode", "base", "batch_shards", "step", "counters")


@pytest.mark.parametrize("place", PLACES)
def test_meta_that_was_edited_is_one_line_or_passed_over(place, tmp_path, assembly, meta):
    *above, last = place.split(".")
    for i, value in enumerate((None, "x", [], {}, [[1]], -1, 1e300, {"a": 1}, "missing")):
        workdir, edited = tmp_path / str(i), copy.deepcopy(meta)
        holder = edited
        for name in above:
            holder = holder[name]
        if value == "missing":
            del holder[last]
        else:
            holder[last] = value
        _write(workdir, json.dumps(edited))
        for act in (
            lambda w=workdir: check_workdir(w, record_of(assembly)),
            lambda w=workdir: keep_batch(assembly.settings, w, 1),
            lambda w=workdir: open_start(assembly, w),
            lambda w=workdir: models.holds_lora(w),
            lambda w=workdir: models.bases_of(w),
        ):
            _one_line(act)
    _one_line(lambda: Pipeline(tmp_path / "0"))
    _one_line(lambda: models.open_models(tmp_path / "0", "slow"))


def test_a_stored_config_that_was_edited_is_named(tmp_path, assembly, meta):
    _write(tmp_path, json.dumps({**meta, "config": {**meta["config"], "lora": 3}}))
    with pytest.raises(
        ConfigError, match=f"the config in the checkpoints of {tmp_path} cannot be read: lora is '3', but"
    ):
        check_workdir(tmp_path, record_of(assembly))


def test_names_that_are_no_steps_are_passed_over(tmp_path, meta):
    items = {name: {"w": jnp.ones(3)} for name in ITEMS}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, items, meta, surely=True)
    checkpoints.close()
    for name in ("²", "٣", "007", "-1", "1e3", "9.bak", "latest", " 2"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    assert stored_meta(tmp_path / "checkpoints")["step"] == 4
    for read_only in (True, False):
        assert Checkpoints(tmp_path / "checkpoints", read_only=read_only).steps() == [1]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 10


def test_counters_that_were_edited_are_damage_before_any_array_is_read(tmp_path, assembly, meta):
    items = {name: {"w": jnp.ones(3)} for name in ITEMS}
    checkpoints = Checkpoints(tmp_path / "checkpoints", read_only=False)
    checkpoints.save(4, items, {**meta, "counters": {"step": "x"}}, surely=True)
    with pytest.raises(CheckpointError, match=r"no readable checkpoint .* step 4: its counters cannot be read"):
        restore_or_init(assembly, checkpoints, None)
    checkpoints.close()


@pytest.mark.parametrize("text", ["{", "[" * 100_000])
def test_a_teacher_whose_config_is_damaged_is_one_line(text, tmp_path, assembly):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        session._is_unfinished(tmp_path, assembly)
