"""`train --dry_run`: compiles the exact train step on abstract arrays, for devices that need not exist."""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from shortcut_jax.config.schema import Settings
from shortcut_jax.config.unused import unused
from shortcut_jax.core.tree import count_parameters, flat_paths
from shortcut_jax.diagnostics.collectives import SMALL, Explanation, explain, tell
from shortcut_jax.run.assembly import Assembly
from shortcut_jax.run.check_training import assemble_training, decay_notice
from shortcut_jax.runtime.aot_targets import target_devices
from shortcut_jax.runtime.hlo import compile_and_partition, count_kinds
from shortcut_jax.steps.state import TrainState

GB = 1e9


def run(settings: Settings, target: str | None, limit_gb: float | None, explained: bool = False) -> int:
    """Prints what a run needs: parameters, FLOPs, bytes a device, collectives, compile time.

    Args:
      settings: of the run.
      target: devices that need not be there (see `runtime.aot_targets`); None for those that are there.
      limit_gb: memory of a device in 1e9 bytes, or None.
      explained: whether every collective is reported, with what it moves and what runs beside it.

    Returns:
      0, or 1 where a device would need more than the limit.

    Raises:
      TargetError: a target that is not known, or whose compiler is not installed.
      ConfigError: settings and devices do not go together.
    """
    devices = None if target is None else target_devices(target)
    assembly = assemble_training(settings, devices)
    for line in (*unused(settings), *decay_notice(assembly)):
        print(line)
    _print_needs(assembly)
    begin = time.perf_counter()
    lowered = assembly.train_step.lower(assembly.state_shapes, assembly.batch_shapes)
    lower_s = time.perf_counter() - begin
    begin = time.perf_counter()
    compiled, partitioned = compile_and_partition(lowered)
    compile_s = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    explanation = explain(assembly, compiled.as_text())
    _print_program(assembly, memory, partitioned, compiled.as_text())
    _print_moved(explanation, assembly.platform)
    _print_row("time", f"lowered in {lower_s:.1f} s, compiled in {compile_s:.1f} s")
    if explained:
        tell(explanation)
    if limit_gb is None:
        return 0
    fits = total <= limit_gb * GB
    _print_row("memory", f"{total / GB:.2f} GB of {limit_gb:g} GB a device: {'fits' if fits else 'does not fit'}")
    return 0 if fits else 1


def _print_needs(assembly: Assembly) -> None:
    """What is known of a run before it is compiled."""
    settings, shapes = assembly.settings, assembly.state_shapes
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


def _print_program(assembly: Assembly, memory: Any, partitioned: str | None, program: str) -> None:
    """Memory and number of collectives of the compiled step."""
    _print_row("arguments a device", f"{memory.argument_size_in_bytes / GB:.2f} GB")
    platform = assembly.platform
    upper = " (XLA:CPU widens bfloat16: an upper estimate for other platforms)" if platform == "cpu" else ""
    _print_row("temporaries a device", f"{memory.temp_size_in_bytes / GB:.2f} GB{upper}")
    for name, size in expected_temporaries(assembly).items():
        _print_row(f"  {name}", f"{size / GB:.2f} GB by arithmetic")
    kinds = count_kinds(partitioned or program)
    where = "right after partitioning" if partitioned else f"in the final program for {platform}"
    _print_row("collectives", (", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "none") + f" ({where})")


def expected_temporaries(assembly: Assembly) -> dict[str, float]:
    """Bytes of a device that a step needs beside its arguments, by arithmetic: what has to be there at least.

    Residuals are those that the rematerialisation policy keeps for the backward pass (none for `none`, which
    leaves the choice to the compiler).
    """
    cfg, s, mesh = assembly.model, assembly.settings, assembly.mesh_shape
    item = jnp.dtype(cfg.compute_dtype).itemsize
    flat = flat_paths(assembly.network_shapes)
    slices = {p: math.prod(x.shape[1:]) for p, x in flat.items() if "_blocks/" in p}
    block = max(sum(n for p, n in slices.items() if p.startswith(f"{stack}_blocks/")) for stack in ("double", "single"))
    tokens = assembly.num_image_tokens + s.data.text_tokens
    rows = assembly.batch_size / s.accumulate / mesh.batch_shards
    inputs, attention, hidden = cfg.width, cfg.width / mesh.tensor, cfg.hidden / mesh.tensor
    kept = {"full": inputs, "selective": inputs + attention + hidden, "dots": 3 * inputs + 3 * attention + hidden}
    trained = assembly.state_shapes.params
    sizes = {
        "gradients": _local_bytes(trained) * (1 if s.accumulate == 1 else 2),
        "a gathered block": block * item / mesh.tensor,
    }
    if cfg.remat in kept:
        blocks = cfg.double_blocks + cfg.single_blocks
        sizes["kept residuals"] = kept[cfg.remat] * blocks * tokens * rows * item
    return sizes


def _print_moved(explanation: Explanation, platform: str) -> None:
    """The bytes of a step's collectives by kind, and what is not as it should be."""
    for (kind, dtype, axes, hidden), size in sorted(explanation.moved().items(), key=lambda item: -item[1]):
        if size >= SMALL and platform != "cpu":
            beside = "beside other work" if hidden else "with nothing beside it"
            _print_row(f"  {kind}", f"{size / GB:.2f} GB a step, {dtype}, over {axes}, {beside}")
    if explanation.unexplained:
        _print_row("  unexplained", f"{len(explanation.unexplained)} collectives (see --explain)")
    if explanation.attention:
        kernels = ", ".join(f"{n} calls of {name}" for name, n in sorted(explanation.attention.items()))
        _print_row("attention", kernels)


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
