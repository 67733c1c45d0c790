"""What a run says before it starts: what is trained, on what, and what it costs."""

from pathlib import Path

from shortcut_jax.assemble import Assembly
from shortcut_jax.core.tree import count_parameters
from shortcut_jax.resolve import objective_settings
from shortcut_jax.runtime.distributed import say


def announce(assembly: Assembly, workdir: Path, start: int) -> None:
    """Tells what is about to run."""
    s, cfg = assembly.settings, assembly.model
    millions = lambda tree: f"{count_parameters(tree) / 1e6:.1f} M"
    trained = f" in {cfg.param_dtype}"
    if s.train == "lora":
        trained = f" frozen in bfloat16, {millions(assembly.state_shapes.params)} in adapters of rank {s.lora.rank}"
    kind = assembly.mesh.devices.flat[0].device_kind
    say(
        f"{s.objective} · {s.model.preset}, {millions(assembly.network_shapes)} parameters{trained}, "
        f"computing in {cfg.compute_dtype}, attention {cfg.attention} · {assembly.batch_size} rows a step, "
        f"{assembly.flops / 1e9:.3g} GFLOP · mesh {assembly.mesh_shape} on {kind}\nworkdir {workdir}"
        + (f", resuming at step {start}" if start else "")
        + ("; all steps are done" if start >= s.steps else "; compiling the first step")
    )
    if s.guide != "told":
        student, first, slow = assembly.evaluations
        say(
            f"guide={s.guide}: a self row is evaluated {student} times with a gradient, and {first} + {slow} times "
            f"without for each pair of jumps"
        )
    untaught = objective_settings(s).untaught
    if s.objective != "flow" and untaught and not start:
        counts = ", ".join(map(str, untaught))
        say(f"student step counts {counts} are taught by untaught steps: {s.jumps} x them is not in student_steps")
