"""What a run keeps of itself in its workdir: the resolved config beside every checkpoint, and how to go on from it."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shortcut_jax.assemble import Assembly
from shortcut_jax.initial import load_initial
from shortcut_jax.runtime.checkpoint import Checkpoints, stored_config
from shortcut_jax.runtime.distributed import say
from shortcut_jax.runtime.sharding import describe_shardings, replicated
from shortcut_jax.settings import ConfigError, compare, complete, to_dict
from shortcut_jax.sources import Model
from shortcut_jax.steps.state import TrainState, from_items, to_items


def record_of(assembly: Assembly) -> dict[str, Any]:
    """The resolved config, as it is stored with every checkpoint: the global batch has replaced `batch_per_device`."""
    return {**to_dict(assembly.settings), "batch_size": assembly.batch_size, "batch_per_device": None}


def check_workdir(workdir: Path, config: dict[str, Any]) -> None:
    """Compares a config with the one a workdir was made by, before anything is written.

    Raises:
      ConfigError: they differ in what makes a run what it is; all such fields and both values are named.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"--workdir={workdir} is a file, not a folder")
    stored = stored_config(workdir / "checkpoints")
    if stored is None:
        return
    differences = compare(complete(stored), config)
    if differences["identity"]:
        raise ConfigError(
            f"the workdir {workdir} holds a different run; stored -> asked for: "
            f"{'; '.join(differences['identity'])}. Choose another --workdir, or the stored values"
        )
    for line in differences["schedule"]:
        say(f"changed since the last run: {line}")


def restore_or_init(
    assembly: Assembly, checkpoints: Checkpoints, initial: Model | None = None
) -> tuple[TrainState, int]:
    """The newest readable state of a workdir, or a fresh one, from given weights if there are any."""
    if not checkpoints.steps():
        return assembly.init_state(load_initial(assembly, initial) if initial else None), 0

    def read(step: int) -> tuple[TrainState, int]:
        meta = checkpoints.meta(step)
        items = checkpoints.restore(step, to_items(assembly.state_shapes))
        whole = replicated(assembly.mesh)
        counters = {k: jax.device_put(np.int32(v), whole) for k, v in meta["counters"].items()}
        return from_items(items, counters), int(meta["step"])

    return checkpoints.newest_readable(read)


def write_record(workdir: Path, assembly: Assembly) -> None:
    """Writes the resolved config and sharding table beside the run, for people."""
    if jax.process_index() == 0:
        (workdir / "config.json").write_text(json.dumps(record_of(assembly), indent=2) + "\n")
        shapes = assembly.state_shapes.params
        table = describe_shardings(jax.tree.map(lambda x: x.sharding, shapes), shapes)
        (workdir / "shardings.txt").write_text(table + "\n")
