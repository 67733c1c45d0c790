"""Training: `python -m shortcut_jax.train --config=configs/digits.py [--config.steps=200] [--workdir=...]`."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from shortcut_jax import command
from shortcut_jax.assemble import Assembly, text_encoder
from shortcut_jax.core.tree import count_parameters
from shortcut_jax.data.pipeline import batches, make_samples
from shortcut_jax.data.records import check_available, open_source
from shortcut_jax.generate import Generator
from shortcut_jax.report import grid_captions, judge, make_reference, sample_grid, write_report
from shortcut_jax.resolve import from_config, objective_settings
from shortcut_jax.runtime import distributed
from shortcut_jax.runtime.checkpoint import Checkpoints, stored_config
from shortcut_jax.runtime.distributed import say
from shortcut_jax.runtime.metrics import MetricLog, peak_flops, read_metrics, save_curves
from shortcut_jax.runtime.sharding import batch_sharding, describe_shardings, process_rows, replicated, to_global
from shortcut_jax.settings import ConfigError, compare, to_dict
from shortcut_jax.steps.state import TrainState, choose_view, from_items, to_items

USAGE = "usage: python -m shortcut_jax.train --config=configs/digits.py [--config.key=value ...] [--workdir=DIR]"


def main(argv: Sequence[str]) -> int:
    """Parses the command line and trains, or compiles only with `--dry_run`. Returns the exit code."""
    from absl import flags
    from ml_collections import config_flags

    values = command.new_flags()
    command.define_config(values, "config", "Config file.", argv)
    flags.DEFINE_string("workdir", None, "Folder of the run; runs/CONFIG-OBJECTIVE by default.", flag_values=values)
    flags.DEFINE_integer("stop_at", None, "Stop after this step, as if interrupted.", flag_values=values)
    flags.DEFINE_boolean("dry_run", False, "Only compile the step and print what it needs.", flag_values=values)
    flags.DEFINE_string("target", None, "Devices of a dry run, as cpu:8.", flag_values=values)
    flags.DEFINE_float("device_memory_gb", None, "Memory limit of a dry run.", flag_values=values)
    options = command.parse(values, argv, USAGE, required=["config"])
    settings = from_config(options.config)
    if options.dry_run:
        from shortcut_jax import dry_run

        return dry_run.run(settings, options.target, options.device_memory_gb)
    if options.target is not None or options.device_memory_gb is not None:
        raise command.UsageError("--target and --device_memory_gb go with --dry_run")
    if options.stop_at is not None and options.stop_at < 1:
        raise command.UsageError(f"--stop_at is {options.stop_at}, but must be at least 1")
    check_available(settings.data)
    distributed.initialize()
    name = Path(config_flags.get_config_filename(values["config"])).stem
    workdir = Path(options.workdir or f"runs/{name}-{settings.objective}")
    return train(Assembly(settings), workdir, options.stop_at)


def train(assembly: Assembly, workdir: Path, stop_at: int | None = None) -> int:
    """Trains to the end (or to `stop_at`, or to a signal), resuming what the workdir holds; writes the report.

    Returns:
      0 at the end or at `stop_at`, 75 after SIGTERM, 130 after Ctrl-C; in each case everything is saved.

    Raises:
      ConfigError: the workdir belongs to another run.
      TrainingError: the loss stayed non-finite; what was saved before is intact.
    """
    settings = assembly.settings
    config = {**to_dict(settings), "batch_size": assembly.batch_size}
    check_workdir(workdir, config)
    source = open_source(settings.data)

    workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(workdir / "checkpoints", settings.keep)
    log = MetricLog(workdir)
    try:
        state, start = restore_or_init(assembly, checkpoints)
        write_record(workdir, config, assembly)
        announce(assembly, workdir, start)
        stop = min(stop_at or settings.steps, settings.steps)
        run = Run(assembly, workdir, checkpoints, log, source, config)
        with distributed.Interruptions() as interruptions:
            if start < stop:
                state = run.loop(state, start, stop, interruptions)
            if stop == settings.steps:
                run.finish(state, interruptions)
    except distributed.Interrupted as interrupted:
        (signal,) = interrupted.args
        checkpoints.wait()
        newest = max(checkpoints.steps())
        say(f"\n{signal.name}: saved step {newest} in {checkpoints.folder}; the same command resumes it")
        return distributed.EXIT_CODES[signal]
    finally:
        log.close()
        checkpoints.close()
    return 0


class Run:
    """The effects of one training run: what is shown, written and saved, and when."""

    def __init__(
        self,
        assembly: Assembly,
        workdir: Path,
        checkpoints: Checkpoints,
        log: MetricLog,
        source: Sequence[dict[str, Any]],
        config: dict[str, Any],
    ):
        self.assembly, self.workdir, self.checkpoints, self.log = assembly, workdir, checkpoints, log
        self.source, self.config = source, config
        self.settings = assembly.settings
        e = self.settings.eval
        self.generator = Generator(assembly, e.batch_size, max(e.steps), e.shift)
        self.grid = Generator(assembly, e.columns, max(e.steps), e.shift)
        known = [source[i]["caption"].decode("utf-8") for i in range(min(len(source), 256))]
        self.captions = grid_captions(e.captions, known, e.columns)

    def loop(self, state: TrainState, start: int, stop: int, interruptions: distributed.Interruptions) -> TrainState:
        """Steps `start` ... `stop - 1`. Raises Interrupted, the state saved, after a signal."""
        s, assembly = self.settings, self.assembly
        sharding = batch_sharding(assembly.mesh)
        rows = process_rows(sharding, assembly.batch_size)
        encode = text_encoder(s, assembly.model)
        samples = make_samples(self.source, encode, s.data.caption_dropout, s.seed)
        data = batches(samples, rows, assembly.batch_size, start, stop)
        shown = {"disable": jax.process_index() > 0, "mininterval": 0.1 if sys.stderr.isatty() else 10.0}
        bar = tqdm(total=s.steps, initial=start, unit="step", dynamic_ncols=True, **shown)
        meter = Meter(assembly)
        pending: tuple[int, dict[str, jax.Array]] | None = None
        with bar:
            for step in range(start + 1, stop + 1):
                batch = to_global(next(data), rows, sharding, assembly.batch_size)
                state, metrics = assembly.train_step(state, batch)
                if pending:  # Read one step late, so that the device never waits for the host.
                    self.record(*pending, meter, bar)
                pending = (step, metrics)
                bar.update()
                signal = interruptions.agreed(step)
                last = step == stop or signal is not None
                if last or _due(step, s.checkpoint_every):
                    self.record(*pending, meter, bar)
                    pending = None
                    self.save(step, state, metrics)
                if _due(step, s.sample_every) and not last:
                    self.show(step, state)
                if signal:
                    raise distributed.Interrupted(signal)
        self.checkpoints.wait()
        say(f"saved step {stop} in {self.checkpoints.folder}")
        return state

    def record(self, step: int, metrics: dict[str, jax.Array], meter: "Meter", bar: tqdm) -> None:
        """Checks, shows and writes the metrics of a step. Raises TrainingError after too many skipped steps."""
        skipped = int(metrics["skipped"])
        if skipped > self.settings.max_skipped:
            raise command.TrainingError(
                f"step {step}: loss {float(metrics['loss'])} and gradient norm {float(metrics['grad_norm'])} are not "
                f"finite, {skipped} steps in a row (max_skipped {self.settings.max_skipped}); nothing of them was kept"
            )
        meter.seen(step)
        if not _due(step, self.settings.log_every):
            return
        values = {name: float(value) for name, value in metrics.items()} | meter.rates(step)
        self.log.scalars(step, values)
        rate = {"img_s": f"{values['images_per_second']:.0f}"} if "images_per_second" in values else {}
        bar.set_postfix(loss=f"{values['loss']:.4f}", **rate)

    def save(self, step: int, state: TrainState, metrics: dict[str, jax.Array]) -> None:
        """Starts a checkpoint of a state that is known to be finite."""
        if not np.isfinite(float(metrics["param_norm"])):
            raise command.TrainingError(f"step {step}: the weights are not finite, so they were not saved")
        if step in self.checkpoints.steps():
            return
        counters = {name: int(getattr(state, name)) for name in ("step", "skipped", "skipped_total")}
        meta = {"step": step, "seed": self.settings.seed, "config": self.config, "counters": counters}
        self.checkpoints.save(step, to_items(state), meta)

    def show(self, step: int, state: TrainState) -> None:
        """Draws the sample grid: the same noise and captions every time."""
        e = self.settings.eval
        picture = sample_grid(self.grid, choose_view(state, e.view), self.captions, e.steps, e.guidance)
        self.log.image(step, f"samples/{e.view}", picture)
        if jax.process_index() == 0:
            folder = self.workdir / "samples"
            folder.mkdir(exist_ok=True)
            picture.save(folder / f"step_{step:08d}.png")

    def finish(self, state: TrainState, interruptions: distributed.Interruptions) -> None:
        """The end of a run: the last sample grid, the loss curve, the judged table, the report."""
        s, e = self.settings, self.settings.eval
        self.show(s.steps, state)
        if not e.views:
            return
        if "label" not in self.source[0]:
            say("no table: the data set has no labels to judge captions by")
            return

        def tell(line: str) -> None:
            say(line)
            interruptions.check()

        tell("judging the samples")
        views = {view: choose_view(state, view) for view in e.views}
        reference = make_reference([self.source[i] for i in range(len(self.source))])
        scores = judge(self.generator, views, e.images, e.steps, e.seeds, e.guidance, reference, tell)
        if jax.process_index() != 0:
            return
        grid = f"samples/step_{s.steps:08d}.png"
        records = read_metrics(self.workdir / "metrics.jsonl")
        save_curves(self.workdir / "loss.png", records, ["loss", "loss/flow", "loss/self"])
        facts = {
            "objective": s.objective,
            "steps": s.steps,
            "global batch": self.assembly.batch_size,
            "parameters": f"{count_parameters(state.params):,}",
            "skipped steps": int(state.skipped_total),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "finished": time.strftime("%Y-%m-%d"),
        }
        path = self.workdir / "report.md"
        title = f"{s.objective} on {s.data.name}, {s.steps} steps"
        printed = write_report(path, title, scores, facts, [grid, "loss.png"])
        print(f"\n{title}: Frechet distance / caption accuracy\n\n{printed}\n")
        print(f"report   {path}\npicture  {self.workdir / grid}", flush=True)


class Meter:
    """Images and FLOPs a second, the compilation of the first step left out."""

    def __init__(self, assembly: Assembly):
        self._assembly = assembly
        self._peak = peak_flops(assembly.mesh.devices.flat[0])
        self._step: int | None = None
        self._time = 0.0

    def seen(self, step: int) -> None:
        """Starts the clock when the first step is known to be done."""
        if self._step is None:
            self._step, self._time = step, time.perf_counter()

    def rates(self, step: int) -> dict[str, float]:
        """Rates since the last call: images a second, model FLOP/s, and MFU where the device's peak is known."""
        if self._step is None or step == self._step:
            return {}
        now = time.perf_counter()
        seconds = (now - self._time) / (step - self._step)
        self._step, self._time = step, now
        flops = self._assembly.flops / seconds
        rates = {"images_per_second": self._assembly.batch_size / seconds, "model_flops_per_second": flops}
        if self._peak:
            rates["mfu"] = flops / (self._peak * self._assembly.mesh_shape.devices)
        return rates


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


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
    differences = compare(stored, config)
    if differences["identity"]:
        raise ConfigError(
            f"the workdir {workdir} holds a different run; stored -> asked for: "
            f"{'; '.join(differences['identity'])}. Choose another --workdir, or the stored values"
        )
    for line in differences["schedule"]:
        say(f"changed since the last run: {line}")


def restore_or_init(assembly: Assembly, checkpoints: Checkpoints) -> tuple[TrainState, int]:
    """The newest readable state of a workdir, or a fresh one."""
    if not checkpoints.steps():
        return assembly.init_state(), 0

    def read(step: int) -> tuple[TrainState, int]:
        meta = checkpoints.meta(step)
        items = checkpoints.restore(step, to_items(assembly.state_shapes))
        whole = replicated(assembly.mesh)
        counters = {k: jax.device_put(np.int32(v), whole) for k, v in meta["counters"].items()}
        return from_items(items, counters), int(meta["step"])

    return checkpoints.newest_readable(read)


def write_record(workdir: Path, config: dict[str, Any], assembly: Assembly) -> None:
    """Writes the resolved config and sharding table beside the run, for people."""
    if jax.process_index() == 0:
        (workdir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        shapes = assembly.state_shapes.params
        table = describe_shardings(jax.tree.map(lambda x: x.sharding, shapes), shapes)
        (workdir / "shardings.txt").write_text(table + "\n")


def announce(assembly: Assembly, workdir: Path, start: int) -> None:
    """Tells what is about to run."""
    s, cfg = assembly.settings, assembly.model
    parameters = count_parameters(assembly.state_shapes.params)
    kind = assembly.mesh.devices.flat[0].device_kind
    say(
        f"{s.objective} · {s.model.preset}, {parameters / 1e6:.1f} M parameters in {cfg.param_dtype}, computing in "
        f"{cfg.compute_dtype}, attention {cfg.attention} · {assembly.batch_size} rows a step, "
        f"{assembly.flops / 1e9:.3g} GFLOP · mesh {assembly.mesh_shape} on {kind}\nworkdir {workdir}"
        + (f", resuming at step {start}" if start else "")
        + ("" if start >= s.steps else "; compiling the first step")
    )
    untaught = objective_settings(s).student.untaught
    if s.objective != "flow" and untaught and not start:
        counts = ", ".join(map(str, untaught))
        say(f"student step counts {counts} are taught by untaught steps: {s.jumps} x them is not in student_steps")


if __name__ == "__main__":
    command.run(main)
