"""One of several processes: it continues workdirs on meshes over the devices of all of them."""

import dataclasses
import json
import pickle
import sys
from pathlib import Path

import jax
import numpy as np

from shortcut_jax.cluster import distributed
from shortcut_jax.config.checks import from_config
from shortcut_jax.config.stored import complete
from shortcut_jax.core.tree import flat_paths
from shortcut_jax.run.assembly import Assembly
from shortcut_jax.run.workdir import meta_of, open_start, restore_or_init
from shortcut_jax.runtime.checkpoint import Checkpoints, stored_config
from shortcut_jax.runtime.sharding import batch_sharding, process_rows, to_global
from shortcut_jax.steps.state import to_items


def assembly_of(workdir, mesh, devices=None):
    """The run of a workdir, on another mesh."""
    settings = from_config(complete(stored_config(workdir / "checkpoints")))
    data, fsdp, tensor = mesh
    mesh = dataclasses.replace(settings.mesh, data=data, fsdp=fsdp, tensor=tensor)
    return Assembly(dataclasses.replace(settings, mesh=mesh), devices)


def batch_of(assembly, step):
    """The rows of this process of a batch that depends on the step alone."""
    rng = np.random.default_rng(step)
    sharding, num_rows = batch_sharding(assembly.mesh), assembly.batch_size
    rows = process_rows(sharding, num_rows)
    draw = lambda s: rng.standard_normal(s.shape, np.float32).astype(s.dtype)[rows]
    return to_global(jax.tree.map(draw, assembly.batch_shapes()), rows, sharding, num_rows)


def continue_run(assembly, workdir, steps, out=None):
    """Restores a workdir, takes `steps` steps, and saves into `out`.

    Returns:
      The restored shards that this process holds, the losses, and the final state.
    """
    source = Checkpoints(workdir / "checkpoints", read_only=True)
    state, start, base = restore_or_init(assembly, source, open_start(assembly, workdir))
    restored = shards_of(state)
    losses = []
    for step in range(start, start + steps):
        state, metrics = assembly.train_step(state, batch_of(assembly, step))
        losses.append(float(metrics["loss"]))
    if out is not None:
        checkpoints = Checkpoints(out / "checkpoints")
        checkpoints.save(start + steps, to_items(state), meta_of(start + steps, assembly, state, base))
        checkpoints.close()
    return restored, losses, state


def shards_of(state):
    """What this process holds of a state: (path, index, values)."""
    parts = {**to_items(state), "counters": {"step": state.step, "spikes": state.spikes._asdict()}}
    return [
        (path, shard.index, np.asarray(shard.data))
        for path, leaf in flat_paths(parts).items()
        for shard in leaf.addressable_shards
    ]


def main(folder):
    """Does the jobs of a folder; writes their results, and what this process held before and after each."""
    distributed.initialize()
    results, held = [], []
    for job in json.loads((folder / "jobs.json").read_text()):
        out = Path(job["out"]) if job["out"] else None
        with jax.default_matmul_precision("highest"):
            assembly = assembly_of(Path(job["workdir"]), job["mesh"])
            restored, losses, state = continue_run(assembly, Path(job["workdir"]), job["steps"], out)
        results.append({"losses": losses, "processes": jax.process_count(), "devices": jax.device_count()})
        held.append((restored, shards_of(state)))
    (folder / f"shards-{jax.process_index()}.pickle").write_bytes(pickle.dumps(held))
    if jax.process_index() == 0:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
