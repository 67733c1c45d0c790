"""`python -m benchmarks.fault_child FAULT[:STEP] ... -- ARGUMENTS`: trains, with faults of its own in this process.

hang: the batch of a step never comes. fail: it cannot be read. spike: it is 1,000 times too large. save-FOO: this
process is killed while it writes the checkpoint of a step: when the folder was made (temp), when a part of the items is
there (items), before it gets its name (commit), before older ones go (delete). full: the disk takes no file above 60 kB
while a step is saved. away: the folder of checkpoints is not found when a step is saved. patience: processes wait so
many seconds for each other's part of a checkpoint. slow: 0.5 s a step. none: no fault.
"""

import os
import resource
import signal
import sys
import time

import numpy as np
from orbax.checkpoint import checkpoint_manager
from orbax.checkpoint._src.checkpointers import async_checkpointer

from shortcut_jax import cli, train
from shortcut_jax.runtime import checkpoint
from shortcut_jax.runtime.checkpoint import Checkpoints
from shortcut_jax.training import loop


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_batch(step: int, change) -> None:
    """Changes the batch of a step."""
    real, calls = loop.to_global, []

    def changed(tree, *args):
        calls.append(1)
        return real(change(tree) if len(calls) == step or step == 0 else tree, *args)

    loop.to_global = changed


def hang(tree):
    time.sleep(10_000)
    return tree


def spike(tree):
    return tree._replace(latents_BhwC=(tree.latents_BhwC * 1000).astype(np.float32))


def fail(tree):
    raise ValueError(f"no image can be read in process {jax_index()}")


def slow(tree):
    time.sleep(0.5)
    return tree


def kill_while_saving(phase: str, step: int) -> None:
    wait, commit = async_checkpointer._background_wait_for_commit_futures, async_checkpointer._on_commit_callback
    finalize = checkpoint_manager.CheckpointManager._finalize_checkpoint

    def waiting(directory, *args, **kwargs):
        if directory.name == str(step) and phase in ("temp", "items"):
            wanted = 1 if phase == "temp" else 3
            while sum(len(list(p.iterdir())) + 1 for p in directory.parent.glob(f"{step}.*")) < wanted:
                time.sleep(0.001)
            kill()
        return wait(directory, *args, **kwargs)

    def committing(tmpdir, *args):
        if tmpdir.get_final().name == str(step) and phase == "commit":
            kill()
        return commit(tmpdir, *args)

    def finalizing(self, at):
        finalize(self, at)
        if at == step and phase == "delete":
            kill()

    async_checkpointer._background_wait_for_commit_futures = waiting
    async_checkpointer._on_commit_callback = committing
    checkpoint_manager.CheckpointManager._finalize_checkpoint = finalizing


def fail_while_saving(kind: str, step: int) -> None:
    start, wait = Checkpoints._start, Checkpoints.wait

    def starting(self, at, *args):
        if at != step:
            return start(self, at, *args)
        if kind == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
            return start(self, at, *args)
        hidden = self.folder.with_name("hidden")
        if hidden.parent.exists() and self.folder.exists() and jax_index() == 0:
            self.folder.rename(hidden)
        try:
            return start(self, at, *args)
        finally:
            if jax_index() == 0:
                hidden.rename(self.folder)

    def waiting(self):
        try:
            return wait(self)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    Checkpoints._start, Checkpoints.wait = starting, waiting


def jax_index() -> int:
    import jax

    return jax.process_index()


def inject(fault: str) -> None:
    kind, _, number = fault.partition(":")
    step = int(number or 0)
    if kind in ("hang", "fail", "spike", "slow"):
        at_batch(step, {"hang": hang, "fail": fail, "spike": spike, "slow": slow}[kind])
    elif kind.startswith("save-"):
        kill_while_saving(kind.removeprefix("save-"), step)
    elif kind in ("full", "away"):
        fail_while_saving(kind, step)
    elif kind == "patience":
        checkpoint.TIMEOUT_SECONDS = step
    elif kind != "none":
        raise ValueError(f"no fault {kind!r}")


if __name__ == "__main__":
    cut = sys.argv.index("--")
    for one in sys.argv[1:cut]:
        inject(one)
    cli.run(train.main, ["train", *sys.argv[cut + 1 :]])
