"""The owner of a run: it claims the workdir, restores, trains, judges, and ends in order."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from PIL import Image

from shortcut_jax.cluster import distributed
from shortcut_jax.cluster.claim import Claim
from shortcut_jax.cluster.distributed import say
from shortcut_jax.cluster.goodput import Account, goodput_line, goodput_table
from shortcut_jax.cluster.heartbeat import Progress
from shortcut_jax.cluster.logs import process_log
from shortcut_jax.cluster.peers import Peers
from shortcut_jax.cluster.shared_folder import check_folder
from shortcut_jax.cluster.timing import Stopwatch
from shortcut_jax.cluster.watchdog import Watchdog
from shortcut_jax.config.checks import from_config
from shortcut_jax.config.load import load_config, load_teacher_config
from shortcut_jax.config.resume import compare
from shortcut_jax.config.schema import Settings, build, to_dict
from shortcut_jax.core.ema import num_restarts
from shortcut_jax.core.local_path import local_path
from shortcut_jax.core.tree import count_parameters
from shortcut_jax.data.training import TrainingData
from shortcut_jax.evaluation.digits import Score, judge, measures, reference_of, table, write_report
from shortcut_jax.evaluation.validation import Validation
from shortcut_jax.inference.codec import training_codec
from shortcut_jax.inference.generator import Generator
from shortcut_jax.inference.sheets import grid_captions, sample_grid
from shortcut_jax.run.assembly import Assembly
from shortcut_jax.run.check_data import check_data, check_grid
from shortcut_jax.run.check_training import assemble_training
from shortcut_jax.run.step_memory import choose_remat
from shortcut_jax.run.workdir import check_workdir, open_start, record_of, restore_or_init, write_record
from shortcut_jax.runtime.checkpoint import Checkpoints, step_folders
from shortcut_jax.runtime.metrics import MetricLog, read_metrics, save_curves
from shortcut_jax.steps.state import TrainState, choose_view, num_updates
from shortcut_jax.training.loop import Outputs, busy, grid_name, loop, show
from shortcut_jax.training.summary import announce, announce_data


def train(assembly: Assembly, workdir: Path, stop_at: int | None = None) -> int:
    """Trains to the end (or to `stop_at`, or to a signal), resuming what the workdir holds; writes the report.

    Returns:
      0 at the end or at `stop_at`, 75 after SIGTERM, 130 after Ctrl-C; in each case everything is saved. Where another
      process is lost, or work hangs, the process ends here with code 75.

    Raises:
      ConfigError: the workdir belongs to another run, or the data are not of the size that the config says.
      TrainingError: the loss stayed non-finite; what was saved before is intact.
      CheckpointError: the last state could not be saved.
      ClaimError: another run works in the workdir.
    """
    settings, watch = assembly.settings, Stopwatch("starting")
    with (
        Claim(workdir) as claim,
        distributed.Interruptions(claim.ending) as interruptions,
        process_log() as log_in,
        Peers(settings.peer_timeout) as peers,
        Watchdog(settings.watchdog, workdir, peers.leave) as watchdog,
    ):
        data, validation = _open_data(assembly, workdir)
        initial = open_start(assembly, workdir)
        check_folder(workdir)
        claim.take()
        log_in(workdir)
        checkpoints = Checkpoints(workdir / "checkpoints", settings.keep, attempts=settings.save_attempts)
        log = MetricLog(workdir)
        start = max(checkpoints.steps(), default=0)
        progress = Progress(workdir, start, settings.steps, watch, settings.heartbeat_every)
        ending = "failed"
        try:
            assembly = _with_remat(assembly, progress, watchdog)
            with progress.doing("restoring" if start else "starting"):
                state, start, base = restore_or_init(assembly, checkpoints, initial)
            progress.begin(start)
            write_record(workdir, assembly)
            log.config(start, record_of(assembly))
            announce(assembly, workdir, start)
            paint = grid_painter(assembly, data)
            outputs = Outputs(workdir, checkpoints, log, paint, progress, watchdog, base, validation)
            stop = min(stop_at or settings.steps, settings.steps)
            _to_the_end(assembly, data, outputs, state, start, stop, interruptions)
            ending = "finished" if stop == settings.steps else "stopped"
        except distributed.Interrupted as interrupted:
            (signal,) = interrupted.args
            with progress.doing("saving"):
                checkpoints.wait()
            ending = "interrupted"
            say(f"\n{signal.name}: {_what_is_saved(checkpoints, start)}; rerun the same command to resume")
            tell_time(goodput_line, progress)
            return distributed.EXIT_CODES[signal]
        except Exception as error:
            peers.failed(error)
            raise
        finally:
            progress.end(ending)
            log.close()
            checkpoints.close()
    return 0


def _with_remat(assembly: Assembly, progress: Progress, watchdog: Watchdog) -> Assembly:
    """Once all else is known to be right: to choose a policy takes a compilation or several."""
    if assembly.settings.model.remat != "auto":
        return assembly
    with progress.doing("compiling"), watchdog.slow("choosing model.remat"):
        return choose_remat(assembly)


def _to_the_end(
    assembly: Assembly,
    data: TrainingData,
    outputs: Outputs,
    state: TrainState,
    start: int,
    stop: int,
    interruptions: distributed.Interruptions,
) -> None:
    """Steps `start` ... `stop - 1`, and the end of the run where that is its last one."""
    announce_data(assembly, data)
    interruptions.check()
    if start < stop:
        state = loop(assembly, data, outputs, state, start, stop, interruptions)
    if stop == assembly.settings.steps:
        finish(assembly, data, outputs, state, interruptions)
    tell_time(goodput_table, outputs.progress)


def _open_data(assembly: Assembly, workdir: Path) -> tuple[TrainingData, Validation | None]:
    """The data of a run and of its validation, if there is any, once they go with its workdir and its network."""
    check_workdir(workdir, record_of(assembly))
    data = TrainingData(assembly.settings.data)
    check_data(assembly.settings, assembly.model, data)
    check_grid(assembly.settings, data)
    validates = assembly.settings.validation.interval(assembly.batch_size)
    return data, Validation(assembly) if validates else None


def tell_time(text: Callable[[Account], str], progress: Progress) -> None:
    """Says where the time of the run went."""
    if jax.process_index() == 0:
        say(text(progress.account()))


def _what_is_saved(checkpoints: Checkpoints, start: int) -> str:
    """What an interrupted run that began at step `start` leaves behind."""
    newest = max(checkpoints.steps(), default=0)
    if newest > start:
        return f"saved step {newest} in {checkpoints.folder}"
    return f"nothing new was to be saved{f' after step {newest}' if newest else ''} in {checkpoints.folder}"


def finish(
    assembly: Assembly,
    data: TrainingData,
    outputs: Outputs,
    state: TrainState,
    interruptions: distributed.Interruptions,
) -> None:
    """The end of a run: the last sample grid, and the report."""
    s = assembly.settings
    with busy(outputs, "sampling", s.steps):
        show(s.steps, s, outputs, state)
    with busy(outputs, "reporting", s.steps):
        report(assembly, data, outputs, state, interruptions)


def report(
    assembly: Assembly,
    data: TrainingData,
    outputs: Outputs,
    state: TrainState,
    interruptions: distributed.Interruptions,
) -> None:
    """Judges the views, where the data can be judged by; writes the loss curve, the table, and where the time went."""
    s, e = assembly.settings, assembly.settings.eval

    def tell(line: str) -> None:
        say(line)
        outputs.watchdog.beat("the report", slow=True)
        interruptions.check()

    scores: list[Score] = []
    if s.data.limit:  # a run on a part of a set is judged by the whole of it
        data = TrainingData(dataclasses.replace(s.data, limit=0))
    reference = reference_of(data) if e.views else "eval.views names no view to judge"
    if isinstance(reference, str):
        tell(f"no table: {reference}")
    else:
        tell("judging the samples")
        generator = Generator(assembly.settings, assembly.model, assembly.mesh, e.batch_size, max(e.steps), e.shift)
        views = {view: choose_view(state, view) for view in e.views}
        scores = judge(generator, views, e.images, e.steps, e.seeds, e.guidance, reference, tell)
    if jax.process_index() != 0:
        return
    workdir = outputs.workdir
    facts = {
        "objective": s.objective,
        "steps": s.steps,
        "global batch": assembly.batch_size,
        "parameters": f"{count_parameters(assembly.network_shapes):,}",
        **({"trained": f"{count_parameters(state.params):,} in adapters"} if s.train == "lora" else {}),
        "EMA restarts": int(num_restarts(num_updates(state), s.ema)),
        "skipped steps": int(state.skipped_total),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "finished": time.strftime("%Y-%m-%d"),
    }
    path = workdir / "report.md"
    title = f"{s.objective} on {s.data.name}, {s.steps} steps"
    where = goodput_table(outputs.progress.account())
    unjudged = reference if isinstance(reference, str) else ""
    if scores:
        print(f"\n{title}: {measures(scores)}\n\n{table(scores)}\n", flush=True)
    try:
        records = read_metrics(workdir / "metrics.jsonl")
        save_curves(workdir / "loss.png", records, ["loss", "loss/flow", "loss/self", "loss/teacher"])
        write_report(path, title, scores, facts, where, [grid_name(s.steps), "loss.png"], unjudged)
    except OSError as error:  # a full disk takes no report, but the run is done and saved
        say(f"the report is not written: {error}")
        return
    print(f"report   {path}\nimage    {workdir / grid_name(s.steps)}", flush=True)


def grid_painter(assembly: Assembly, data: TrainingData) -> Callable[[Any], Image.Image]:
    """Weights -> the sample grid of `settings.eval`: a row a step count, a column a caption."""
    e, network = assembly.settings.eval, (assembly.settings, assembly.model)
    generator = Generator(*network, assembly.mesh, e.columns, max(e.steps), e.shift, training_codec(*network, data))
    captions = grid_captions(e.captions, data.captions(256), e.columns)
    return lambda params: sample_grid(generator, params, captions, e.steps, e.guidance)


def train_teacher(config_file: Path, settings: Settings) -> int:
    """Trains what a run starts from first, where it is absent or unfinished and the config file tells how.

    Such a config file has a `get_teacher_config()` beside `get_config()`. Returns the exit code.
    """
    made = load_teacher_config(config_file)
    if made is None or settings.init_from is None:
        return 0
    workdir, own = local_path(settings.init_from, "init_from"), from_config(made)
    data = dataclasses.replace(own.data, dir=settings.data.dir)
    teacher = assemble_training(dataclasses.replace(own, data=data, mesh=settings.mesh))
    if not distributed.agree(_is_unfinished(workdir, teacher)):
        return 0
    say(f"init_from={settings.init_from} is not found, or not finished: training the teacher first")
    return train(teacher, workdir)


def _is_unfinished(workdir: Path, teacher: Assembly) -> bool:
    """Whether a workdir is absent, or holds fewer steps of this very run than it has."""
    if not workdir.exists():
        return True
    if not (workdir / "config.json").is_file():
        return False  # someone else's checkpoint
    stored = to_dict(build(load_config(workdir / "config.json", {})))
    steps = step_folders(workdir / "checkpoints")
    same = not compare(stored, record_of(teacher))["identity"]
    return same and max(steps, default=0) < teacher.settings.steps
