"""`train --dry_run`: compiles the exact train step on abstract arrays, for devices that need not exist."""

import math
import re
import time
from collections.abc import Sequence
from typing import Any

import jax

from shortcut_jax.assemble import Assembly
from shortcut_jax.command import UsageError
from shortcut_jax.core.tree import count_parameters
from shortcut_jax.runtime import distributed
from shortcut_jax.runtime.hlo import compile_and_partition, count_kinds
from shortcut_jax.settings import Settings
from shortcut_jax.steps.state import TrainState

GB = 1e9


def run(settings: Settings, target: str | None, limit_gb: float | None) -> int:
    """Prints what a run needs: parameters, FLOPs, bytes a device, collectives, compile time.

    Args:
      settings: of the run.
      target: `cpu:N` for N simulated devices, `gpu:h100:NODESxGPUS` for GPUs that need not be there; None for the
        devices that are there.
      limit_gb: memory of a device in 1e9 bytes, or None.

    Returns:
      0, or 1 where a device would need more than the limit.

    Raises:
      UsageError: a target that is not known.
      ConfigError: settings and devices do not go together.
    """
    devices = None if target is None else _devices(target)
    assembly = Assembly(settings, devices)
    shapes = assembly.state_shapes
    parameters = count_parameters(assembly.network_shapes)
    shards = assembly.mesh_shape.fsdp * assembly.mesh_shape.tensor
    state_bytes = _local_bytes(shapes)
    print(
        f"{settings.model.preset} · {settings.objective} · mesh {assembly.mesh_shape} on "
        f"{assembly.mesh.devices.flat[0].device_kind}"
    )
    rows = [
        ("parameters", f"{parameters:,}"),
        ("rows a step", f"{assembly.batch_size:,}"),
        ("model FLOPs a step", f"{assembly.flops:.4g} ({assembly.flops / assembly.batch_size / 1e12:.3g} T a row)"),
        ("state a device", f"{state_bytes / GB:.2f} GB ({state_bytes * shards / parameters:.2f} bytes a parameter)"),
    ]
    if settings.train == "lora":
        trained = count_parameters(shapes.params)
        rows.insert(1, ("adapters", f"{trained:,} (rank {settings.lora.rank}, {trained / parameters:.1%})"))
    rows += [(f"  {name}", f"{size / GB:.2f} GB") for name, size in _kinds(shapes).items() if size]
    for row in rows:
        _print_row(*row)
    begin = time.perf_counter()
    lowered = assembly.train_step.lower(shapes, assembly.batch_shapes)
    lower_s = time.perf_counter() - begin
    begin = time.perf_counter()
    compiled, partitioned = compile_and_partition(lowered)
    compile_s = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    _print_row("arguments a device", f"{memory.argument_size_in_bytes / GB:.2f} GB")
    platform = distributed.platform_of(assembly.mesh.devices.flat[0])
    upper = " (XLA:CPU widens bfloat16: an upper estimate for other platforms)" if platform == "cpu" else ""
    _print_row("temporaries a device", f"{memory.temp_size_in_bytes / GB:.2f} GB{upper}")
    kinds = count_kinds(partitioned or compiled.as_text())
    where = "right after partitioning" if partitioned else f"in the final program for {platform}"
    _print_row("collectives", (", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "none") + f" ({where})")
    _print_row("time", f"lowered in {lower_s:.1f} s, compiled in {compile_s:.1f} s")
    if limit_gb is None:
        return 0
    fits = total <= limit_gb * GB
    _print_row("memory", f"{total / GB:.2f} GB of {limit_gb:g} GB a device: {'fits' if fits else 'does not fit'}")
    return 0 if fits else 1


def _devices(target: str) -> Sequence[Any]:
    """The devices of a target. Raises UsageError for one that is not known, or cannot be compiled for here."""
    gpus = re.fullmatch(rf"gpu:({'|'.join(distributed.GPUS)}):([1-9]\d*)x([1-9]\d*)", target)
    if gpus:
        try:
            return distributed.described_gpus(gpus[1], int(gpus[2]), int(gpus[3]))
        except ImportError as error:
            raise UsageError(f"--target={target}: {error}; pip install '.[cuda]' (no GPU is needed)") from error
    if not re.fullmatch(r"cpu:[1-9]\d*", target):
        kinds = ", ".join(f"gpu:{name}:NODESxGPUS" for name in distributed.GPUS)
        raise UsageError(f"--target={target}, but must be cpu:N with N at least 1, such as cpu:8, or {kinds}")
    distributed.simulate_devices(int(target.removeprefix("cpu:")))
    return jax.devices()


def _kinds(state: TrainState) -> dict[str, int]:
    """Bytes of one device's shard of a state, by what they are for."""
    return {
        "frozen base": _local_bytes(state.frozen.base),
        "teacher's adapters": _local_bytes(state.frozen.teacher),
        "trained weights": _local_bytes(state.params),
        "moments": _local_bytes(state.opt_state),
        "fast and slow EMA": _local_bytes(state.ema),
    }


def _local_bytes(tree: Any) -> int:
    """Bytes of one device's shards."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _print_row(name: str, value: str) -> None:
    print(f"  {name:<22}{value}", flush=True)
