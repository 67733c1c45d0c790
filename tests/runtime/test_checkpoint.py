import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.errors import CheckpointError
from shortcut_jax.runtime import checkpoint
from shortcut_jax.runtime.checkpoint import ITEMS, Checkpoints, stored_config


def _items(value):
    return {name: {"w": jnp.full((4, 3), value + i, jnp.float32)} for i, name in enumerate(ITEMS)}


def _abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _items(0.0))


@pytest.fixture
def folder(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, _items(10.0 * step), {"step": step, "config": {"seed": step}})
    checkpoints.close()
    return tmp_path / "checkpoints"


def test_items_come_back_one_by_one_and_only_the_newest_are_kept(folder):
    checkpoints = Checkpoints(folder, read_only=True)
    assert checkpoints.steps() == [2, 3]
    restored = checkpoints.restore(3, {"slow": _abstract()["slow"]})
    assert set(restored) == {"slow"}
    np.testing.assert_array_equal(restored["slow"]["w"], np.full((4, 3), 32.0))
    assert checkpoints.meta(3) == {"step": 3, "config": {"seed": 3}, "format_version": 1}


def test_a_saved_array_may_be_donated_at_once(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1.0, tree), donate_argnums=0)
    items = {name: {"w": jnp.zeros((512, 512))} for name in ITEMS}
    for step in range(1, 4):
        items = add(items)
        checkpoints.save(step, items, {"step": step, "config": {}})
    items = add(items)
    checkpoints.wait()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), items)
    for step in range(1, 4):
        np.testing.assert_array_equal(checkpoints.restore(step, shapes)["fast"]["w"], float(step))


@pytest.mark.parametrize("damage", ["truncate", "remove_item", "meta"])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used(folder, damage, capfd):
    if damage == "truncate":
        for path in (folder / "3" / "params").rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "remove_item":
        shutil.rmtree(folder / "3" / "params")
    else:
        (folder / "3" / "meta" / "metadata").write_text("{")
    checkpoints = Checkpoints(folder, keep=2)

    def read(step):
        return checkpoints.meta(step)["step"], checkpoints.restore(step, _abstract())

    step, items = checkpoints.newest_readable(read)
    assert step == 2
    np.testing.assert_array_equal(items["params"]["w"], np.full((4, 3), 20.0))
    assert "step 3" in capfd.readouterr().err
    assert (folder.parent / "damaged-checkpoint-3").is_dir()
    checkpoints.save(3, _items(1.0), {"step": 3, "config": {}})
    checkpoints.close()
    assert Checkpoints(folder, read_only=True).steps() == [2, 3]


def test_what_was_set_aside_before_stays(folder):
    for _ in range(2):
        (folder / "3" / "meta" / "metadata").write_text("{")
        checkpoints = Checkpoints(folder, keep=2)
        assert checkpoints.newest_readable(lambda step: step) == 2
        checkpoints.save(3, _items(1.0), {"step": 3, "config": {}})
        checkpoints.close()
    assert {p.name for p in folder.parent.glob("damaged*")} == {"damaged-checkpoint-3", "damaged-checkpoint-3-2"}


def test_another_format_is_no_damage(folder):
    path = folder / "3" / "meta" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 7}))
    checkpoints = Checkpoints(folder, keep=2)
    for read in (checkpoints.meta, lambda step: checkpoints.newest_readable(lambda step: step)):
        with pytest.raises(CheckpointError, match=r"3 is of format 7, but this version .* reads format 1"):
            read(3)
    with pytest.raises(CheckpointError, match="is of format 7"):
        stored_config(folder)
    checkpoints.close()
    assert Checkpoints(folder, read_only=True).steps() == [2, 3]


def test_all_processes_fall_back_where_one_cannot_read(folder, monkeypatch):
    answers = iter([np.array([True, False]), np.array([True, True])])
    checkpoints = Checkpoints(folder, read_only=True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(checkpoint.multihost_utils, "process_allgather", lambda well: next(answers))
    monkeypatch.setattr(checkpoints, "meta", lambda step: {})
    assert checkpoints.newest_readable(lambda step: step) == 2


def test_a_reader_falls_back_without_touching_anything(folder):
    (folder / "3" / "meta" / "metadata").write_text("{")
    before = sorted(p for p in folder.parent.rglob("*"))
    checkpoints = Checkpoints(folder, read_only=True)
    assert checkpoints.newest_readable(lambda step: checkpoints.meta(step)["step"]) == 2
    assert sorted(p for p in folder.parent.rglob("*")) == before


def test_where_nothing_can_be_read_the_reasons_are_told(folder):
    for step in (2, 3):
        (folder / str(step) / "meta" / "metadata").write_text("{")
    checkpoints = Checkpoints(folder, read_only=True)
    with pytest.raises(CheckpointError, match=r"step 3: .*step 2: "):
        checkpoints.newest_readable(checkpoints.meta)


@pytest.mark.parametrize("name", ["²", "x", "1"])
def test_a_folder_that_is_no_checkpoint_has_no_config(name, tmp_path):
    meta = tmp_path / name / "meta"
    meta.mkdir(parents=True)
    (meta / "metadata").write_text("[" * 100_000)
    assert stored_config(tmp_path) is None


def test_the_stored_config_is_the_newest_readable_one(folder, tmp_path):
    assert stored_config(folder) == {"seed": 3}
    (folder / "3" / "meta" / "metadata").write_text("{")
    assert stored_config(folder) == {"seed": 2}
    assert stored_config(tmp_path / "nowhere") is None
