"""What a run keeps of itself in its workdir: the resolved config beside every checkpoint, and how to go on from it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from shortcut_jax.cluster.distributed import say
from shortcut_jax.config.derive import mesh_shape, objective_settings
from shortcut_jax.config.resume import compare
from shortcut_jax.config.schema import Settings, to_dict
from shortcut_jax.config.stored import read_stored
from shortcut_jax.errors import ConfigError
from shortcut_jax.run.assembly import Assembly
from shortcut_jax.run.start_from import BaseRecord, Initial, freeze, open_initial, start
from shortcut_jax.runtime.checkpoint import ITEMS, Checkpoints, stored_meta
from shortcut_jax.runtime.sharding import describe_shardings, replicated, summarise_shardings
from shortcut_jax.steps.networks import Frozen
from shortcut_jax.steps.objectives import row_group
from shortcut_jax.steps.state import TrainState, from_items, to_counters, to_items
from shortcut_jax.weights.finite import check_placed


def record_of(assembly: Assembly) -> dict[str, Any]:
    """The resolved config, as it is stored with every checkpoint: the global batch has replaced `batch_per_device`."""
    return {**to_dict(assembly.settings), "batch_size": assembly.batch_size, "batch_per_device": None}


def check_workdir(workdir: Path, config: dict[str, Any]) -> None:
    """Compares a config with the one a workdir was made by, before anything is written.

    Raises:
      ConfigError: they differ in what makes a run what it is; all such fields and both values are named. Or the run
        stopped by skipped steps, and this config would bear no more of them.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"--workdir={workdir} is a file, not a folder")
    meta = stored_meta(workdir / "checkpoints")
    if meta is None:
        return
    stored = _stored(workdir, meta)
    differences = compare(stored, config)
    if differences["identity"]:
        raise ConfigError(
            f"the workdir {workdir} holds a different run; stored -> asked for: "
            f"{'; '.join(differences['identity'])}. Choose another --workdir, or the stored values"
        )
    stopped = meta["stopped"]
    if config["max_skipped"] < stopped and config["spikes"] == stored["spikes"]:
        raise ConfigError(
            f"the run in {workdir} stopped at step {meta['step']} after {stopped} skipped steps in a row (not finite, "
            f"or spikes), and would again: {remedy(workdir, stopped)}"
        )
    for line in differences["schedule"]:
        say(f"changed since the last run: {line}")


def _stored(workdir: Path, meta: dict[str, Any]) -> dict[str, Any]:
    try:
        return read_stored(meta["config"])
    except ValueError as error:  # each kind of UserError, and ConfigError
        raise ConfigError(f"the config in the checkpoints of {workdir} cannot be read: {error}") from error


def remedy(workdir: Path, skipped: int) -> str:
    """How to continue a run that stopped after so many skipped steps in a row."""
    return (
        f"to resume after them, set --config.max_skipped={skipped} or more (or change --config.spikes.factor); for a "
        f"lower learning rate, start another workdir with --config.init_from={workdir}"
    )


def keep_batch(settings: Settings, workdir: Path, num_devices: int) -> Settings:
    """Settings with the global batch that a workdir was started with, where other devices would give another.

    Raises:
      ConfigError: that batch does not divide over these devices.
    """
    meta = stored_meta(workdir / "checkpoints")
    if meta is None:
        return settings
    rows, then, now = _stored(workdir, meta)["batch_size"], meta["batch_shards"], mesh_shape(settings, num_devices)
    if not rows:
        raise ConfigError(f"the config in the checkpoints of {workdir} has batch_size {rows}: it was edited")
    shards, asked = now.batch_shards, settings.batch_per_device
    started_with = settings.batch_size if asked is None else asked * (then or shards)
    if started_with != rows and (asked is None or then):
        return settings  # not the batch that the run was started with: `check_workdir` tells
    group = row_group(objective_settings(settings)).size
    unit = settings.accumulate * group
    if rows % (shards * unit):
        fitting = ", ".join(str(n) for n in range(1, rows // unit + 1) if rows % (n * unit) == 0)
        raise ConfigError(
            f"the workdir {workdir} keeps its global batch of {rows} rows, which does not divide over {shards} "
            f"shards (data x fsdp) x {settings.accumulate} micro-batches x groups of {group} rows: "
            + (f"set --config.mesh.data x .fsdp to one of {fitting}" if fitting else "set --config.accumulate=1")
        )
    if asked is None or rows == asked * shards:
        return settings
    say(
        f"the global batch stays {rows} rows, as the run was started: {rows // shards} on each of {shards} shards "
        f"(data x fsdp), not batch_per_device={asked}"
    )
    return dataclasses.replace(settings, batch_size=rows, batch_per_device=None)


def open_start(assembly: Assembly, workdir: Path) -> Initial:
    """What a run needs besides its workdir: weights to start from, or the base of adapters. See `open_initial`."""
    s, meta = assembly.settings, stored_meta(workdir / "checkpoints")
    if meta is None:
        return open_initial(assembly) if s.init_from or s.base else Initial()
    return open_initial(assembly, meta["base"]) if s.has_base else Initial()


def restore_or_init(
    assembly: Assembly, checkpoints: Checkpoints, initial: Initial
) -> tuple[TrainState, int, BaseRecord | None]:
    """The newest readable state of a workdir, or a fresh one; its step; what is to be said of its base.

    Raises:
      ConfigError: the base has changed.
      CheckpointError: none can be read.
      ConversionError: values that are not finite.
    """
    if not checkpoints.steps():
        state, base = start(assembly, initial)
        return state, 0, base

    def read(step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        meta = {**checkpoints.meta(step), "step": step}
        try:  # before the arrays, and where an older checkpoint can take its place
            from_items(dict.fromkeys(ITEMS), meta["counters"], Frozen())
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"its counters cannot be read: {type(error).__name__} {error}") from error
        return checkpoints.restore(step, to_items(assembly.state_shapes)), meta

    items, meta = checkpoints.newest_readable(read)
    folder = checkpoints.folder / str(meta["step"])
    check_placed(items, f"{folder} (remove it to resume at the checkpoint before)")
    frozen, base = freeze(assembly, initial, meta.get("base"))
    whole = replicated(assembly.mesh)
    state = from_items(items, meta["counters"], frozen, lambda scalar: jax.device_put(scalar, whole))
    return state, meta["step"], base


def meta_of(
    step: int, assembly: Assembly, state: TrainState, base: BaseRecord | None, stopped: int = 0
) -> dict[str, Any]:
    """What is stored as JSON beside the arrays of a checkpoint; `stopped`: by so many skipped steps in a row."""
    return {
        "step": step,
        "seed": assembly.settings.seed,
        "config": record_of(assembly),
        "batch_shards": assembly.mesh_shape.batch_shards,
        "counters": to_counters(state),
        "base": base and base._asdict(),
        **({"stopped": stopped} if stopped else {}),
    }


def write_record(workdir: Path, assembly: Assembly) -> None:
    """Writes the resolved config and sharding table beside the run, for people."""
    if jax.process_index() == 0:
        (workdir / "config.json").write_text(json.dumps(record_of(assembly), indent=2) + "\n")
        shapes: Any = assembly.state_shapes.params
        if assembly.settings.has_base:
            shapes = {"trained": shapes, "frozen": assembly.state_shapes.frozen}
        table = describe_shardings(shapes, assembly.settings.mesh.min_shard)
        (workdir / "shardings.txt").write_text(table + "\n")
        if assembly.mesh_shape.devices > 1:
            say(f"shardings: {summarise_shardings(shapes)}; {workdir / 'shardings.txt'} has all and the reasons")
