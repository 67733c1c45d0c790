"""Saves that fail: older checkpoints stay, the run goes on, and the next save is complete."""

import errno
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from orbax.checkpoint import checkpoint_manager
from orbax.checkpoint._src.checkpointers import async_checkpointer

from shortcut_jax.cluster.logs import log_file, process_log
from shortcut_jax.errors import CheckpointError
from shortcut_jax.runtime import checkpoint
from shortcut_jax.runtime.checkpoint import ITEMS, Checkpoints


def _items(value):
    return {name: {"w": jnp.full((4, 3), value + i, jnp.float32)} for i, name in enumerate(ITEMS)}


def _save(checkpoints, step, **options):
    checkpoints.save(step, _items(10.0 * step), {"step": step, "config": {}}, **options)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(checkpoint, "PAUSE_SECONDS", 0.01)


@pytest.fixture
def background_fails(monkeypatch):
    """Makes so many of the next saves fail in the background, of a full disk."""
    real, left = async_checkpointer._background_wait_for_commit_futures, []

    def fails(directory, futures, *args, **kwargs):
        if left:
            left.pop()
            for future in futures:
                future.result()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(directory, futures, *args, **kwargs)

    monkeypatch.setattr(async_checkpointer, "_background_wait_for_commit_futures", fails)
    return lambda times: left.extend(range(times))


def _on_disk(folder):
    return sorted(p.name for p in folder.iterdir() if p.name[0].isdigit())


def test_a_save_that_fails_in_the_background_keeps_the_last_one_and_the_next_one_works(
    tmp_path, background_fails, capfd
):
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    _save(checkpoints, 1)
    assert checkpoints.wait()
    background_fails(1)
    _save(checkpoints, 2)
    assert not checkpoints.wait()
    assert "writing the checkpoint of step 2 failed: [Errno 28] No space left on device" in capfd.readouterr().err
    assert checkpoints.steps() == [1] and "1" in _on_disk(tmp_path / "c")
    _save(checkpoints, 3)
    assert checkpoints.wait()
    assert checkpoints.steps() == [3] and _on_disk(tmp_path / "c") == ["3"]
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _items(0.0))
    np.testing.assert_array_equal(checkpoints.restore(3, abstract)["params"]["w"], np.full((4, 3), 30.0))
    checkpoints.close()


def test_a_failing_save_is_one_line_an_attempt_and_the_log_has_the_rest(tmp_path, background_fails, capfd):
    logging.set_verbosity(logging.ERROR)  # as every command does; tests before this one may have set another
    with process_log() as log_in:
        log_in(tmp_path)
        checkpoints = Checkpoints(tmp_path / "c", keep=1, attempts=3)
        background_fails(3)
        with pytest.raises(CheckpointError, match="in 3 attempts"):
            _save(checkpoints, 1, surely=True)
        checkpoints.close()
    line = "writing the checkpoint of step 1 failed: [Errno 28] No space left on device"
    assert capfd.readouterr().err.splitlines() == [line] * 3
    log = log_file(tmp_path, 0).read_text()
    assert log.count("Failed to run") == 3 and log.count("Traceback") > 3 and "INFO writing the checkpoint" in log


def test_what_tensorstore_says_of_the_disk_is_told_without_its_paths(tmp_path, monkeypatch, capfd):
    def fails(*args):
        raise ValueError(f"OUT_OF_RANGE: Error writing {'x' * 300}: File too large [os_error_code='27'] [spec='{{}}']")

    monkeypatch.setattr(checkpoint, "_check_storage", fails)
    _save(Checkpoints(tmp_path / "c"), 1)
    assert "writing the checkpoint of step 1 failed: [Errno 27] File too large\n" in capfd.readouterr().err


def test_a_background_failure_is_noticed_at_the_next_save(tmp_path, background_fails, capfd):
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    background_fails(1)
    _save(checkpoints, 1)
    _save(checkpoints, 2)
    checkpoints.close()
    assert "writing the checkpoint of step 1 failed" in capfd.readouterr().err
    assert _on_disk(tmp_path / "c") == ["2"]


def test_the_last_save_is_tried_again_and_gives_up_with_a_clear_error(tmp_path, background_fails):
    checkpoints = Checkpoints(tmp_path / "c", keep=1, attempts=3)
    _save(checkpoints, 1, surely=True)
    background_fails(2)
    _save(checkpoints, 2, surely=True)
    assert _on_disk(tmp_path / "c") == ["2"]
    background_fails(3)
    with pytest.raises(CheckpointError, match=r"step 3 could not be written .* in 3 attempts .*No space.*of step 2"):
        _save(checkpoints, 3, surely=True)
    checkpoints.close()
    again = Checkpoints(tmp_path / "c", keep=1)
    assert again.steps() == [2]
    _save(again, 4, surely=True)
    again.close()
    assert _on_disk(tmp_path / "c") == ["4"]


@pytest.mark.parametrize("kind", ["gone", "no room"])
def test_storage_that_cannot_be_written_is_told_and_does_not_stop_the_run(tmp_path, kind, monkeypatch, capfd):
    folder = tmp_path / "c"
    checkpoints = Checkpoints(folder, keep=1, attempts=2)
    _save(checkpoints, 1, surely=True)
    with monkeypatch.context() as patch:
        if kind == "gone":
            folder.rename(tmp_path / "hidden")
        else:
            usage = shutil.disk_usage(folder)._replace(free=100)
            patch.setattr(shutil, "disk_usage", lambda path: usage)
        _save(checkpoints, 2)
        if kind == "gone":
            (tmp_path / "hidden").rename(folder)
    error = capfd.readouterr().err
    assert error.count("writing the checkpoint of step 2 failed") == 2
    assert "No such file" in error if kind == "gone" else "No space left on device: 0.0 GB free" in error
    assert "no checkpoint of step 2 after 2 attempts" in error
    _save(checkpoints, 3, surely=True)
    checkpoints.close()
    assert _on_disk(folder) == ["3"]


def test_an_older_step_goes_only_after_the_newer_one_is_complete(tmp_path, monkeypatch):
    seen = []
    real = checkpoint_manager.CheckpointManager._finalize_checkpoint

    def finalize(self, step):
        real(self, step)
        seen.append(_on_disk(tmp_path / "c"))

    monkeypatch.setattr(checkpoint_manager.CheckpointManager, "_finalize_checkpoint", finalize)
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    for step in (1, 2):
        _save(checkpoints, step, surely=True)
    checkpoints.close()
    assert seen == [["1"], ["1", "2"]] and _on_disk(tmp_path / "c") == ["2"]


def test_what_was_cut_off_is_no_checkpoint_and_is_removed_when_training_goes_on(tmp_path, monkeypatch):
    folder = tmp_path / "c"
    checkpoints = Checkpoints(folder, keep=2)
    _save(checkpoints, 1, surely=True)
    monkeypatch.setattr(async_checkpointer, "_on_commit_callback", lambda *args: None)  # as if killed before
    _save(checkpoints, 2)
    checkpoints.wait()
    (leftover,) = (p for p in folder.iterdir() if p.name.startswith("2."))
    assert any(leftover.rglob("metadata"))
    assert Checkpoints(folder, read_only=True).steps() == [1] and leftover.exists()
    monkeypatch.undo()
    again = Checkpoints(folder, keep=2)
    assert again.steps() == [1]
    _save(again, 2, surely=True)
    again.close()
    assert _on_disk(folder) == ["1", "2"]


def test_a_save_that_is_complete_though_an_error_was_raised_is_a_save(tmp_path, monkeypatch, capfd):
    real = checkpoint_manager.CheckpointManager._finalize_checkpoint

    def finalize(self, step):
        real(self, step)
        raise TimeoutError("another process was not heard of")

    checkpoints = Checkpoints(tmp_path / "c", keep=1, attempts=2)
    _save(checkpoints, 1, surely=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_manager.CheckpointManager, "_finalize_checkpoint", finalize)
        _save(checkpoints, 2, surely=True)
    assert capfd.readouterr().err.count("writing the checkpoint of step 2 failed: another process") == 1
    assert checkpoints.steps() == [1, 2]
    _save(checkpoints, 3, surely=True)
    checkpoints.close()
    assert _on_disk(tmp_path / "c") == ["3"]
