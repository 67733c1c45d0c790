import errno
import os
from pathlib import Path

import pytest

from shortcut_jax.cluster.shared_folder import check_place
from shortcut_jax.errors import FolderError


@pytest.mark.parametrize("folder", [True, False])
def test_a_place_that_can_be_written_is_left_as_it_was(folder, tmp_path):
    (tmp_path / "there").mkdir()
    for path in (tmp_path / "there", tmp_path / "new", tmp_path / "a" / "b" / "c"):
        check_place(path, "--out", folder)
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize("folder", [True, False])
def test_a_place_where_nothing_can_be_is_one_line_with_the_reason(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    places = {tmp_path / "file" / "x" / "y": "Not a directory", Path("/proc/x"): "No such file or directory in /proc"}
    for path, reason in places.items():
        with pytest.raises(FolderError, match=f"^cannot write to --out={path}: {reason}.*; choose another --out$"):
            check_place(path, "--out", folder)
    assert (tmp_path / "file").read_text() == "mine"

    def read_only(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(FolderError, match=f"Read-only file system in {tmp_path}; choose another --to"):
        check_place(tmp_path / "x", "--to", folder)


def test_a_file_is_no_folder_but_may_be_replaced(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(FolderError, match="is a file, not a folder"):
        check_place(file, "--workdir")
    check_place(file, "--out", folder=False)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root, who may write anything
    with pytest.raises(FolderError, match="Permission denied"):
        check_place(file, "--out", folder=False)
