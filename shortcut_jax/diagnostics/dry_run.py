"""`train --dry_run`: compiles the exact train step on abstract arrays, for devices that need not exist."""

from collections.abc import Sequence

from shortcut_jax.config.schema import Settings
from shortcut_jax.config.unused import unused
from shortcut_jax.core.tree import count_parameters
from shortcut_jax.diagnostics.collectives import SMALL, Explanation, explain, tell
from shortcut_jax.diagnostics.compiled_step import UNREAD, CompiledStep, compile_step
from shortcut_jax.diagnostics.roofline import Efficiencies, summary, tables
from shortcut_jax.run.assembly import Assembly
from shortcut_jax.run.check_training import assemble_training, decay_notice
from shortcut_jax.run.step_memory import GB, Needs, choose_remat, expected_temporaries, needs_of
from shortcut_jax.runtime.aot_targets import target_devices
from shortcut_jax.runtime.device_table import USABLE
from shortcut_jax.runtime.hlo import count_kinds
from shortcut_jax.runtime.sharding import local_bytes
from shortcut_jax.steps.state import TrainState


def run(
    settings: Settings,
    target: str | None,
    limit_gb: float | None,
    explained: bool = False,
    efficiencies: Efficiencies | None = None,
) -> int:
    """Prints what a run needs: parameters, FLOPs, bytes a device, collectives, time of a step by its roofline.

    Args:
      settings: of the run.
      target: devices that need not be there (see `runtime.aot_targets`); None for those that are there.
      limit_gb: memory of a device in 1e9 bytes, or None.
      explained: whether every collective is reported, with what it moves and what runs beside it, and the time of a
        step by pass and kind of kernel.
      efficiencies: shares of a data sheet's figures that kernels reach; those of `Efficiencies` by default.

    Returns:
      0, or 1 where a device would need more than the limit.

    Raises:
      TargetError: a target that is not known, or whose compiler is not installed.
      ConfigError: settings and devices do not go together.
    """
    assembly = assemble_training(settings, None if target is None else target_devices(target))
    for line in (*unused(settings), *decay_notice(assembly)):
        print(line)
    _print_needs(assembly)
    step = _compile(assembly, limit_gb, efficiencies)
    explanation = explain(step.assembly, step.program)
    _print_program(step)
    _print_moved(explanation, step)
    if step.time:
        for row in summary(step.time, *step.share):
            _print_row(*row)
    elif explained or efficiencies:
        print(f"  {_no_figures(step)}")
    _print_row("compiled", f"in {step.compiling:.1f} s, after {step.lowering:.1f} s of lowering")
    if explained:
        tell(explanation)
    if explained and step.time:
        shards = assembly.mesh_shape.fsdp * assembly.mesh_shape.tensor
        print(tables(step.time, count_parameters(assembly.state_shapes.params) / shards) + "\n")
    if limit_gb is None:
        return 0
    fits = step.bytes <= limit_gb * GB
    _print_row("memory", f"{step.bytes / GB:.2f} GB of {limit_gb:g} GB a device: {'fits' if fits else 'does not fit'}")
    return 0 if fits else 1


def compare(
    variants: Sequence[tuple[str, Settings]],
    target: str | None,
    limit_gb: float | None,
    efficiencies: Efficiencies | None,
) -> int:
    """Prints the programs of several settings side by side, a line each as it is compiled.

    Args:
      variants: names and settings.
      target: as in `run`.
      limit_gb: as in `run`; a program that needs more is marked.
      efficiencies: as in `run`.

    Returns:
      0, or 1 where one of them would need more than the limit.
    """
    devices = None if target is None else target_devices(target)
    assemblies = [(name, assemble_training(settings, devices)) for name, settings in variants]
    first, width = assemblies[0][1], max(len(name) for name, _ in assemblies)
    line = lambda name, cells: (
        f"{name:{width}}  " + "  ".join(f"{c:>{len(h)}}" for c, h in zip(cells, COLUMNS, strict=True))
    )
    print(f"mesh {first.mesh_shape} on {first.mesh.devices.flat[0].device_kind}; of one device\n\n{line('', COLUMNS)}")
    fits = True
    for name, assembly in assemblies:
        step = _compile(assembly, limit_gb, efficiencies)
        over = limit_gb is not None and step.bytes > limit_gb * GB
        print(line(name, _cells(step)) + (f"  does not fit {limit_gb:g} GB" if over else ""), flush=True)
        fits = fits and not over
    if step.time is None:
        print(f"\n{_no_figures(step)}")
    return 0 if fits else 1


def _compile(assembly: Assembly, limit_gb: float | None, efficiencies: Efficiencies | None) -> CompiledStep:
    """The step of a run, with the policy that `model.remat=auto` chooses."""
    compiled: dict[str, CompiledStep] = {}

    def needs(tried: Assembly) -> Needs:
        step = compiled[tried.model.remat] = compile_step(tried, efficiencies)
        return needs_of(step.memory, step.text)

    chosen = choose_remat(assembly, None if limit_gb is None else USABLE * limit_gb * GB, needs)
    return compiled.get(chosen.model.remat) or compile_step(chosen, efficiencies)


def _no_figures(step: CompiledStep) -> str:
    if step.kind.startswith(UNREAD):
        return f"step times are not known: programs of {step.kind} are not read that far"
    return f"step times are not known: {step.kind} is not in the table of devices (see --target)"


COLUMNS = ("step, ms", "MFU  ", "samples/s", "waiting, ms", "executed", "arguments, GB", "temporaries, GB", "compiled")
"""Of a comparison: practical times, executed over model FLOPs, bytes, seconds of compiling."""


def _cells(step: CompiledStep) -> list[str]:
    arguments, temporaries = step.memory.argument_size_in_bytes, step.memory.temp_size_in_bytes
    sizes = [f"{arguments / GB:.2f}", f"{temporaries / GB:.2f}", f"{step.compiling:.1f} s"]
    if step.time is None:
        return ["-"] * 5 + sizes
    (model, rows), took = step.share, step.time.practical
    rates = f"{step.time.mfu(took, model):.1%}", f"{rows / took.seconds:.2f}"
    return [f"{1e3 * took.seconds:.1f}", *rates, f"{1e3 * took.waiting:.1f}", f"{step.time.flops / model:.3f}", *sizes]


def _print_needs(assembly: Assembly) -> None:
    """What is known of a run before it is compiled."""
    settings, shapes = assembly.settings, assembly.state_shapes
    parameters = count_parameters(assembly.network_shapes)
    shards = assembly.mesh_shape.fsdp * assembly.mesh_shape.tensor
    state_bytes = local_bytes(shapes)
    print(
        f"{settings.model.preset} · {settings.objective} · mesh {assembly.mesh_shape} on "
        f"{assembly.mesh.devices.flat[0].device_kind}"
    )
    rows = [
        ("parameters", f"{parameters:,}"),
        ("rows a step", f"{assembly.batch_size:,}"),
        ("model FLOPs a step", f"{assembly.flops():.4g} ({assembly.flops() / assembly.batch_size / 1e12:.3g} T a row)"),
        ("state a device", f"{state_bytes / GB:.2f} GB ({state_bytes * shards / parameters:.2f} bytes a parameter)"),
    ]
    if settings.train == "lora":
        trained = count_parameters(shapes.params)
        rows.insert(1, ("adapters", f"{trained:,} (rank {settings.lora.rank}, {trained / parameters:.1%})"))
    rows += [(f"  {name}", f"{size / GB:.2f} GB") for name, size in _kinds(shapes).items() if size]
    for row in rows:
        _print_row(*row)


def _print_program(step: CompiledStep) -> None:
    """Memory and number of collectives of the compiled step."""
    assembly, memory = step.assembly, step.memory
    _print_row("arguments a device", f"{memory.argument_size_in_bytes / GB:.2f} GB")
    platform = assembly.platform
    upper = " (XLA:CPU widens bfloat16: an upper estimate for other platforms)" if platform == "cpu" else ""
    _print_row("temporaries a device", f"{memory.temp_size_in_bytes / GB:.2f} GB{upper}")
    for name, size in expected_temporaries(assembly).items():
        _print_row(f"  {name}", f"{size / GB:.2f} GB by arithmetic")
    kinds = count_kinds(step.partitioned or step.text)
    where = "right after partitioning" if step.partitioned else f"in the final program for {platform}"
    _print_row("collectives", (", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "none") + f" ({where})")


def _print_moved(explanation: Explanation, step: CompiledStep) -> None:
    """The bytes of a step's collectives by kind, how long they are waited for, and what is not as it should be."""
    for (kind, dtype, axes, hidden), size in sorted(explanation.moved().items(), key=lambda item: -item[1]):
        if size >= SMALL and step.assembly.platform != "cpu":
            beside = "beside other work" if hidden else "with nothing beside it"
            _print_row(f"  {kind}", f"{size / GB:.2f} GB a step, {dtype}, over {axes}, {beside}")
    for (kind, axes), wire in sorted(step.time.wires.items() if step.time else (), key=lambda item: -item[1].seconds):
        if wire.bytes >= SMALL:
            took = f"{1e3 * wire.seconds:.3g} ms over {axes}, {wire.waited / wire.seconds:.0%} of it waited for"
            _print_row(f"  {kind}s take", took)
    if explanation.unexplained:
        _print_row("  unexplained", f"{len(explanation.unexplained)} collectives (see --explain)")
    if explanation.attention:
        kernels = ", ".join(f"{n} calls of {name}" for name, n in sorted(explanation.attention.items()))
        _print_row("attention", kernels)


def _kinds(state: TrainState) -> dict[str, int]:
    """Bytes of one device's shard of a state, by what they are for."""
    return {
        "frozen base": local_bytes(state.frozen.base),
        "teacher's adapters": local_bytes(state.frozen.teacher),
        "trained weights": local_bytes(state.params),
        "moments": local_bytes(state.opt_state),
        "fast and slow EMA": local_bytes(state.ema),
    }


def _print_row(name: str, value: str) -> None:
    print(f"  {name:<21} {value}", flush=True)
