"""Checkpoints: one Orbax composite a step, of separate items, so that a reader restores only what it needs.

Items are pytrees (`params`, `fast`, `slow`, `optimizer`) and `meta`, a JSON dict. Writing is asynchronous and atomic:
a step's folder appears under its name only when it is complete, and older steps go only after that. Storage that fails
is reported, tried again and lived with; only a save that has to be sure gives up.
"""

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from shortcut_jax.cluster.distributed import say
from shortcut_jax.cluster.logs import LOGGER
from shortcut_jax.cluster.shared_folder import probe
from shortcut_jax.errors import CheckpointError

ITEMS = ("params", "fast", "slow", "optimizer")
META = "meta"
FORMAT_VERSION = 1
PAUSE_SECONDS = 2.0
"""Before the second attempt at a save; four times as long before each further one."""

TIMEOUT_SECONDS = 600
"""How long processes wait for each other's part of a checkpoint in the background."""

_STEP = re.compile("0|[1-9][0-9]*")

_OF_BASE = ("path", "hash")
_KINDS: dict[str, Any] = {
    **{"config": dict, "counters": dict, "base": dict | None, "step": int, "seed": int},
    **{"batch_shards": int | None, "stopped": int},
}
"""What the fields of a checkpoint's `meta` have to be."""

Result = TypeVar("Result")


def _orbax() -> Any:
    """Orbax, imported on first use: half of what `sample --help` would wait for."""
    import orbax.checkpoint

    return orbax.checkpoint


class Checkpoints:
    """The checkpoints of one workdir.

    Attributes:
      folder: holds one folder a step.
    """

    def __init__(self, folder: Path, keep: int | None = None, read_only: bool = False, attempts: int = 1):
        """Opens the folder, and makes it unless `read_only`, which also removes what was cut off while being written.

        `keep` newest steps survive a save (all, if None), which is tried `attempts` times.
        """
        self.folder = folder.resolve()
        self._read_only, self._attempts = read_only, attempts
        self._writing: int | None = None
        self._why, self._stale = "", False
        ocp = _orbax()
        with _quiet():  # Orbax warns that what is to be read only is read only.
            options = ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else keep,
                read_only=read_only,
                create=not read_only,
                enable_async_checkpointing=not read_only,
                cleanup_tmp_directories=not read_only,
                async_options=ocp.options.AsyncOptions(
                    timeout_secs=TIMEOUT_SECONDS,
                    create_directories_asynchronously=False,  # else threads wait for one that cannot be made
                ),
            )
            self._manager = ocp.CheckpointManager(self.folder, item_names=(*ITEMS, META), options=options)

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def holding(self, item: str) -> list[int]:
        """Those of them that have an item."""
        return [step for step in self.steps() if (self.folder / str(step) / item).is_dir()]

    def save(self, step: int, items: dict[str, Any], meta: dict[str, Any], surely: bool = False) -> None:
        """Starts writing a step in the background. The arrays may be donated as soon as this returns.

        Where the storage fails, older checkpoints stay, it is reported in a line, and the next save is the next chance.

        Args:
          step: its number.
          items: see `ITEMS`.
          meta: for JSON.
          surely: waits until all of it is on disk.

        Raises:
          CheckpointError: `surely`, and all attempts failed.
        """
        self.wait()
        for attempt in range(self._attempts):
            if attempt:
                time.sleep(PAUSE_SECONDS * 4 ** (attempt - 1))
            if self._start(step, items, meta) and (not surely or self.wait()):
                return
        kept = max(self.steps(), default=None)
        left = "there is none before it" if kept is None else f"the last one is that of step {kept}"
        if surely:
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder} in {self._attempts} attempts "
                f"({self._why}); {left}: fix the storage and run the same command"
            )
        say(f"no checkpoint of step {step} after {self._attempts} attempts; {left}; the run continues to the next one")

    def _start(self, step: int, items: dict[str, Any], meta: dict[str, Any]) -> bool:
        ocp = _orbax()
        args = {name: ocp.args.StandardSave(items[name]) for name in ITEMS}
        meta = {**meta, "format_version": FORMAT_VERSION}
        if self._stale and jax.process_index() == 0:
            for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)
        if not self._went_well(step, lambda: _check_storage(self.folder, items)):
            return False
        if self._stale:
            self._reload()
            self._stale = False
        self._writing = step
        composite = ocp.args.Composite(**args, **{META: ocp.args.JsonSave(meta)})
        return self._went_well(step, lambda: self._manager.save(step, args=composite))

    def wait(self) -> bool:
        """Returns when everything is on disk, or has failed: whether the last save went well, on all processes."""
        step, self._writing = self._writing, None
        return step is None or self._went_well(step, self._manager.wait_until_finished)

    def _went_well(self, step: int, act: Callable[[], Any]) -> bool:
        """Whether a part of a save worked on every process; else it is reported. The next save removes what it left."""
        why = ""
        try:
            act()
        except Exception as failure:  # Orbax, TensorStore and the disk each raise their own kinds.
            why = _reason(_root(failure))
            LOGGER.info("writing the checkpoint of step %d failed", step, exc_info=failure)
            who = f" on process {jax.process_index()}" if jax.process_count() > 1 else ""
            print(f"writing the checkpoint of step {step} failed{who}: {why}", file=sys.stderr, flush=True)
        if _all_agree(not why):
            return True
        self._why = why or "another process could not write it"
        with contextlib.suppress(Exception):  # what still runs may fail of the same
            self._manager.wait_until_finished()
        self._writing = None
        return _all_agree(self._reload() and step in self.steps())  # complete after all, where only its news was lost

    def _reload(self) -> bool:
        """Looks which steps are on disk: a save that fails has taken those that it would replace off Orbax's list."""
        self._stale = True
        there = self.folder.is_dir()
        if there:
            self._manager.reload()
        return there

    def close(self) -> None:
        """Waits, then releases the folder."""
        try:
            self._manager.wait_until_finished()
        except Exception as failure:
            LOGGER.info("writing the last checkpoint failed", exc_info=failure)
            print(f"writing the last checkpoint failed: {_reason(_root(failure))}", file=sys.stderr, flush=True)
        self._manager.close()

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON item of a step. Raises CheckpointError for another format than this version's."""
        ocp = _orbax()
        meta = self._manager.restore(step, args=ocp.args.Composite(**{META: ocp.args.JsonRestore()}))[META]
        return _checked(meta, self.folder / str(step))

    def restore(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
        """Reads the named items only, into the shapes, dtypes and shardings of the given abstract trees."""
        ocp = _orbax()
        args = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        return {name: restored[name] for name in items}

    def newest_readable(self, read: Callable[[int], Result]) -> Result:
        """The result of `read(step)` for the newest step for which it works.

        A damaged checkpoint, one that any of the processes cannot read, is named and passed over by all of them. Once
        an older one was read, it is (unless read-only) set aside under another name, so that training can write that
        step again; nothing is deleted.

        Raises:
          CheckpointError: none can be read, or the newest is of another format, which is no damage.
        """
        failed: dict[int, str] = {}
        for step in reversed(self.steps()):
            result = None
            try:
                self.meta(step)
                result = read(step)
            except CheckpointError:
                raise
            except Exception as failure:  # Orbax, TensorStore and JSON each raise their own kinds.
                failed[step] = _first_line(failure)
            if not _all_agree(step not in failed):
                failed.setdefault(step, "another process could not read it")
                say(f"the checkpoint of step {step} in {self.folder} is damaged: falling back to the one before")
                continue
            if failed and not self._read_only:
                self._set_aside(failed)
            return cast(Result, result)
        why = "; ".join(f"step {step}: {reason}" for step, reason in failed.items()) or "there is none"
        raise CheckpointError(f"no readable checkpoint in {self.folder}: {why}")

    def _set_aside(self, steps: Iterable[int]) -> None:
        for step in steps if jax.process_index() == 0 else ():
            first = self.folder.parent / f"damaged-checkpoint-{step}"
            others = (first.with_name(f"{first.name}-{n}") for n in itertools.count(2))
            aside = next(path for path in itertools.chain([first], others) if not path.exists())
            (self.folder / str(step)).rename(aside)
            say(f"the damaged checkpoint was moved to {aside}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()


def step_folders(folder: Path) -> dict[int, Path]:
    """The folders of `folder` that are named as a step is, the newest first; other names are somebody else's."""
    named = (path for path in folder.iterdir() if _STEP.fullmatch(path.name)) if folder.is_dir() else ()
    return dict(sorted(((int(path.name), path) for path in named), reverse=True))


def _checked(meta: Any, path: Path) -> dict[str, Any]:
    """The `meta` of a checkpoint.

    Raises:
      ValueError: it is not what this package writes: damaged, or edited.
      CheckpointError: it is of another format.
    """
    if not isinstance(meta, dict) or "format_version" not in meta:
        raise ValueError("its meta has no format_version")
    version = meta["format_version"]
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint {path} is of format {version}, but this version of shortcut_jax reads format "
            f"{FORMAT_VERSION}: use the version that wrote it"
        )
    for name, kinds in _KINDS.items():
        if name in meta and not isinstance(meta[name], kinds):
            raise ValueError(f"its meta has {name} = {str(meta[name])[:40]!r}")
    base = meta.get("base") or dict.fromkeys(_OF_BASE, "")
    if "config" not in meta or not all(isinstance(base.get(name), str) for name in _OF_BASE):
        raise ValueError("its meta lacks the config, or the base")
    return meta


def _all_agree(well: bool) -> bool:
    """Whether all went well on every process."""
    if jax.process_count() == 1:
        return well
    return bool(np.all(multihost_utils.process_allgather(np.asarray(well))))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _reason(error: BaseException) -> str:
    """The first line, or what the system said: TensorStore tells that behind many paths."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return f"[Errno {code[1]}] {os.strerror(int(code[1]))}" if code else _first_line(error)


def _root(error: BaseException) -> BaseException:
    """What an error began with: Orbax's processes wait for each other once more after one of them has failed."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def _check_storage(folder: Path, items: dict[str, Any]) -> None:
    """Raises OSError where a folder cannot be written, or has no room for the items, all of them: processes share it.

    Orbax would find that out in the background, in a part of the processes, while the others wait for them.
    """
    probe(folder / f".probe-{jax.process_index()}", 4096)
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} needed")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def stored_meta(folder: Path) -> dict[str, Any] | None:
    """The newest readable `meta` of a checkpoint folder, by reading small JSON files only; or None.

    Raises:
      CheckpointError: that checkpoint is of another format.
    """
    for path in step_folders(folder).values():
        with contextlib.suppress(OSError, ValueError, RecursionError):
            meta = _checked(json.loads((path / META / "metadata").read_text()), path)
            return {"base": None, "batch_shards": None, "stopped": 0, **meta}
    return None


def stored_config(folder: Path) -> dict[str, Any] | None:
    """The config in `stored_meta`."""
    meta = stored_meta(folder)
    return meta and meta["config"]
