"""Whether a folder can be written to, and is the same one for all processes: asked before any long work starts."""

import contextlib
import errno
import os
import secrets
import time
from pathlib import Path

from shortcut_jax.cluster import key_value
from shortcut_jax.errors import FolderError

PROBE_BYTES = 1 << 20
"""Written and flushed to disk by every process: a full disk takes an empty file."""

PATIENCE = 60.0
"""Seconds until a new file has to be seen by all hosts; NFS keeps what it knows of a folder for up to as long."""


def check_folder(folder: Path, flag: str = "--workdir", patience: float = PATIENCE) -> None:
    """Makes a folder if need be, writes into it from every process, and looks whether all see the file of process 0.

    Raises:
      FolderError: it cannot be written to, or it is not shared. The commands notify the other processes.
    """
    token = f".token-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe(folder / f"{token}-{key_value.process_id()}", PROBE_BYTES)
    except OSError as error:
        raise FolderError(f"cannot write to {folder}: {error.strerror}; choose another {flag}") from None
    if key_value.num_processes() == 1:
        return
    path = folder / token
    try:
        if key_value.process_id() == 0:
            path.write_text(token)
        token_of_0 = key_value.gather("write to the workdir", token)[0]
        until = time.monotonic() + patience
        while not (folder / token_of_0).exists():
            if time.monotonic() > until:
                raise FolderError(
                    f"{folder} is not shared: after {patience:g} s process {key_value.process_id()} does not see a "
                    f"file that process 0 wrote there; choose a folder on a file system that all hosts mount"
                )
            time.sleep(0.2)
        key_value.gather("see the workdir", token)
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def check_place(path: Path, flag: str, folder: bool = True) -> None:
    """Looks whether a folder (or a file) can be written at a path, in what is there of it; nothing is left behind.

    Cheap, so that it can come before anything that takes time, whereas `check_folder` makes the folder.

    Raises:
      FolderError: it cannot, in the name of a flag.
    """
    if folder and path.exists() and not path.is_dir():
        raise FolderError(f"{flag}={path} is a file, not a folder: choose another {flag}")
    there = path if folder else path.parent
    try:
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not folder and path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        trial = there / f".probe-{secrets.token_hex(8)}"
        trial.mkdir()  # access rights alone say nothing of /proc, or of a file system that is read only
        trial.rmdir()
    except OSError as error:
        raise FolderError(
            f"cannot write to {flag}={path}: {error.strerror} in {there}; choose another {flag}"
        ) from None


def probe(path: Path, size: int) -> None:
    """Writes a file of `size` bytes to the disk, and removes it. Raises OSError where that cannot be done."""
    try:
        with path.open("wb") as file:
            file.write(os.urandom(size))
            file.flush()
            os.fsync(file.fileno())
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
