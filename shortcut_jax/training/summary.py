"""What a run says before it starts: what is trained, on what, and what it costs."""

from pathlib import Path

import jax

from shortcut_jax.cluster.distributed import say, tell
from shortcut_jax.config.derive import objective_settings
from shortcut_jax.config.unused import unused
from shortcut_jax.core.schedules import start_of
from shortcut_jax.core.tree import count_parameters
from shortcut_jax.data.schedule import BatchSchedule
from shortcut_jax.data.training import TrainingData
from shortcut_jax.run.assembly import Assembly
from shortcut_jax.run.check_training import decay_notice
from shortcut_jax.steps.objectives import OBJECTIVES, row_group
from shortcut_jax.training.caption_lengths import report_cuts


def announce(assembly: Assembly, workdir: Path, start: int) -> None:
    """Tells what is about to run."""
    s, cfg = assembly.settings, assembly.model
    millions = lambda tree: f"{count_parameters(tree) / 1e6:.1f} M"
    trained = f" in {cfg.param_dtype}"
    if s.train == "lora":
        trained = f" frozen in bfloat16, {millions(assembly.state_shapes.params)} in adapters of rank {s.lora.rank}"
    kind = assembly.mesh.devices.flat[0].device_kind
    products = f" with {cfg.matmul_dtype} products" if cfg.matmul_dtype else ""
    say(
        f"{s.objective} · {s.model.preset}, {millions(assembly.network_shapes)} parameters{trained}, "
        f"computing in {cfg.compute_dtype}{products}, attention {cfg.attention} · {assembly.batch_size} rows a step, "
        f"{assembly.flops() / 1e9:.3g} GFLOP · mesh {assembly.mesh_shape} on {kind}\nworkdir {workdir}"
        + (f", resuming at step {start}" if start else "")
        + ("; all steps are done" if start >= s.steps else "; compiling the first step")
    )
    if cfg.matmul_dtype and assembly.platform == "cpu":
        say("model.matmul_dtype=float8 is emulated on a CPU: the same rounding, and no time saved")
    tell([*unused(s), *decay_notice(assembly)])
    if s.guidance_mode != "embedded":
        student, first, slow = assembly.evaluations
        say(
            f"guidance_mode={s.guidance_mode}: a self row is evaluated {student} times with a gradient, and {first} + "
            f"{slow} times without for each pair of jumps"
        )
    asked = objective_settings(s)
    self_rows, row = row_group(asked).distilled, OBJECTIVES[s.objective]
    if self_rows and not cfg.step_size and s.teacher_share < 1 and 1 in s.student_steps:
        share = asked.student.one_step_share
        remedy = "raise one_step_share" if s.one_step_share else "set one_step_share in place of student_weights"
        hint = f"; below 50% one step learns a mean over the others: {remedy}" if share < 0.5 else ""
        if asked.student.start < 1:
            two = start_of(2, asked.student.start)
            scaled = ", and all times of a sampler are scaled so" if asked.student.scaled else ""
            say(f"one step begins at t = 1, two at {two:g}, many at {asked.student.start:g}{scaled}")
        else:
            say(f"of the self rows that begin at pure noise, {share:.0%} learn one step{hint}")
    if row.any_interval and not s.adaptive_power:
        say(f"objective={s.objective} has errors of very different sizes: its authors weigh them, adaptive_power=1")
    high = s.timestep_range[1]
    if high < 1 and row.distils and not self_rows:  # flow alone draws all times
        say(f"timestep_range ends at {high:g}: nothing trains the times above, where sampling begins")
    if row.distils and not row.any_interval and asked.unsupervised_counts and not start:
        counts = ", ".join(map(str, asked.unsupervised_counts))
        untrained = f"{s.jumps} x them is not in student_steps"
        say(f"the targets of student step counts {counts} use smaller steps that no sample trains: {untrained}")


def announce_data(assembly: Assembly, data: TrainingData) -> None:
    """Tells what an epoch is made of, where that is not plain: several sets or sizes, or less than a batch."""
    rows, records = assembly.batch_size, data.num_records
    if jax.process_index() == 0:  # which alone prints, and so alone reads the captions
        tell(report_cuts(data))
    if records < rows:
        say(f"{records} images for {rows} rows a step: each is repeated, with noise of its own")
    if len(data.sets) > 1:
        shares = data.shares.sum(axis=0)
        say("mixed: " + ", ".join(f"{one.name} {share:.1%}" for one, share in zip(data.sets, shares, strict=True)))
    if len(data.buckets) > 1:
        schedule = BatchSchedule(data.epoch_sizes, rows, assembly.settings.seed)
        sizes = ", ".join(f"{h} x {w}: {n:,}" for (h, w), n in zip(data.buckets, data.epoch_sizes, strict=True) if n)
        say(
            f"an epoch of {records:,} images in {sum(n > 0 for n in data.epoch_sizes)} buckets ({sizes}), one step "
            f"compiled for each; {int(schedule.batches_before(1).sum()):,} batches of {rows} in the first, "
            f"{int(schedule.leftover(1).sum()):,} images carried over into the next"
        )
