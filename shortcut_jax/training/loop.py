"""The training loop: step after step, with metrics, checkpoints, validations and sample grids where they are due."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from shortcut_jax.cluster import distributed
from shortcut_jax.cluster.distributed import say
from shortcut_jax.cluster.heartbeat import Progress
from shortcut_jax.cluster.logs import LOGGER
from shortcut_jax.cluster.watchdog import Watchdog
from shortcut_jax.config.schema import Settings
from shortcut_jax.core.latents import PATCH
from shortcut_jax.data.pipeline import BatchReader, ahead, batches
from shortcut_jax.data.training import TrainingData
from shortcut_jax.errors import CheckpointError, TrainingError
from shortcut_jax.evaluation.validation import Validation
from shortcut_jax.run.assembly import Assembly, mean_flops, text_encoder
from shortcut_jax.run.start_from import BaseRecord
from shortcut_jax.run.workdir import meta_of, remedy
from shortcut_jax.runtime.checkpoint import Checkpoints
from shortcut_jax.runtime.compilation_cache import CompileClock
from shortcut_jax.runtime.metrics import Meter, MetricLog
from shortcut_jax.runtime.profiling import Profiler, parse_steps
from shortcut_jax.runtime.sharding import batch_sharding, process_rows, to_global
from shortcut_jax.steps.state import TrainState, choose_view, to_items


class DivergedError(TrainingError):
    """More steps in a row were skipped than the run tolerates."""

    def __init__(self, message: str, skipped: int):
        """`skipped` is their number."""
        super().__init__(message)
        self.skipped = skipped


class Outputs(NamedTuple):
    """Where a run leaves what it makes.

    Attributes:
      workdir: the folder of all of it.
      checkpoints: of the train state.
      log: scalars and images.
      draw_grid: weights -> the sample grid, with the same noise and captions every time.
      base: what a checkpoint says of the frozen base, if there is one.
      validation: weights -> the loss on held-out images, where it is asked for.
      progress: the heartbeat, and where the time goes.
      watchdog: learns what the run does.
    """

    workdir: Path
    checkpoints: Checkpoints
    log: MetricLog
    draw_grid: Callable[[Any], Image.Image]
    progress: Progress
    watchdog: Watchdog
    base: BaseRecord | None = None
    validation: Validation | None = None


def loop(
    assembly: Assembly,
    data: TrainingData,
    outputs: Outputs,
    state: TrainState,
    start: int,
    stop: int,
    interruptions: distributed.Interruptions,
) -> TrainState:
    """Runs steps `start` ... `stop - 1`. Raises Interrupted, the state saved, after a signal."""
    s, sharding = assembly.settings, batch_sharding(assembly.mesh)
    rows = process_rows(sharding, assembly.batch_size)
    encode, channels = text_encoder(s, assembly.model), assembly.model.channels // PATCH**2
    reader = BatchReader(data, encode, rows, assembly.batch_size, s.seed, channels)
    read = batches(reader, start, stop, s.data.threads, s.data.workers)
    placed = ahead(to_global(batch, rows, sharding, assembly.batch_size) for batch in read)
    progress, flops = outputs.progress, mean_flops(assembly, data)
    meter = Meter(assembly.batch_size, flops, assembly.peak_flops, progress.watch)
    validated_every = s.validation.interval(assembly.batch_size)
    profiler = Profiler(parse_steps(s.profile_steps), outputs.workdir / "profile", start)
    compiled: set[tuple[int, ...]] = set()
    pending: tuple[int, dict[str, jax.Array]] | None = None
    shown: dict[str, Any] = dict(total=s.steps, initial=start, unit="step", dynamic_ncols=True, smoothing=0)
    shown |= dict(disable=jax.process_index() > 0, mininterval=0.1 if sys.stderr.isatty() else 10.0)
    kept = finite_kept(assembly, outputs, lambda: (state, metrics))
    with contextlib.closing(read), progress.training(), profiler, kept, tqdm(**shown) as bar:
        for step in range(start + 1, stop + 1):
            outputs.watchdog.beat(f"step {step}", slow=step == start + 1)
            if profiler.starts(step):
                profile(profiler.start, pending, progress)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = advance(assembly, state, placed, compiled, progress)
            if profiler.stops(step):
                profile(profiler.stop, metrics, progress)
            if pending:  # Read one step late, so that the device never waits for the host.
                record(*pending, s, outputs, meter, bar)
            pending = (step, metrics)
            bar.update()
            signal = interruptions.agreed()
            last = step == stop or signal is not None
            saves = last or _due(step, s.checkpoint_every)
            validates = signal is None and (_due(step, validated_every) or step == s.steps)
            draws = _due(step, s.sample_every) and not last
            if saves or validates or draws:
                record(*pending, s, outputs, meter, bar)
                pending = None
            if saves:
                with busy(outputs, "saving", step):
                    save(step, assembly, outputs, state, metrics, last, stopping=signal is not None)
                progress.note()
            if outputs.validation and validates:
                with busy(outputs, "validating", step):
                    validate(step, s, outputs.validation, outputs.log, state)
            if draws:
                with busy(outputs, "sampling", step):
                    show(step, s, outputs, state)
            if signal:
                raise distributed.Interrupted(signal)
    say(f"saved step {stop} in {outputs.checkpoints.folder}")
    return state


def profile(change: Callable[[], None], metrics: Any, progress: Progress) -> None:
    """Starts or stops the profiler once the devices have done what was given to them."""
    await_step(metrics, progress)
    with progress.doing("profiling"):
        change()


@contextlib.contextmanager
def finite_kept(
    assembly: Assembly, outputs: Outputs, current: Callable[[], tuple[TrainState, dict[str, jax.Array]]]
) -> Iterator[None]:
    """Saves the state where the block stops as too many steps were skipped: they have changed no weight in it.

    `current` returns it and the metrics of its step, which may be one after the step that stopped the run.

    Raises:
      TrainingError: in place of DivergedError, with what was saved and how to resume.
    """
    try:
        yield
    except DivergedError as stop:
        state, metrics = current()
        step, where = int(state.step), outputs.checkpoints.folder
        try:
            with busy(outputs, "saving", step):
                save(step, assembly, outputs, state, metrics, last=True, stopped=stop.skipped)
        except (CheckpointError, TrainingError) as error:
            raise TrainingError(f"{stop}; {error}") from stop
        outputs.progress.note()
        raise TrainingError(f"{stop}; saved step {step} in {where}: {remedy(outputs.workdir, stop.skipped)}") from stop


@contextlib.contextmanager
def busy(outputs: Outputs, state: str, step: int) -> Iterator[None]:
    """Work beside the steps, as heartbeat, goodput and watchdog are to know it."""
    with outputs.progress.doing(state), outputs.watchdog.slow(f"{state} at step {step}"):
        yield


def advance(
    assembly: Assembly, state: TrainState, placed: Iterator[Any], compiled: set[tuple[int, ...]], progress: Progress
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Dispatches the next step. The first one of each shape is compiled, which is printed, and `compiled` notes it."""
    with progress.watch("data"):
        batch = next(placed)
    shape = batch.latents_BhwC.shape
    if shape in compiled:
        return assembly.train_step(state, batch)
    compiled.add(shape)
    with progress.doing("compiling"), CompileClock() as clock:
        state_and_metrics = assembly.train_step(state, batch)
    if clock.programs:  # another run of this process may have compiled it
        tell(f"the step for images of {' x '.join(map(str, shape[1:]))}: {clock}", sys.stderr)
    return state_and_metrics


def await_step(metrics: Any, progress: Progress) -> None:
    """Waits until a step is done, if there is one."""
    with progress.watch("device"):
        jax.block_until_ready(metrics)


def record(step: int, metrics: dict[str, jax.Array], s: Settings, outputs: Outputs, meter: Meter, bar: tqdm) -> None:
    """Checks, shows and writes the metrics of a step. Raises DivergedError after too many skipped steps."""
    progress = outputs.progress
    await_step(metrics, progress)
    skipped = int(metrics["skipped"])
    progress.done(step, skipped > 0)
    if progress.due:
        progress.beat(float(metrics["loss"]))
    if skipped > s.max_skipped:
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        why = f"a spike (spikes.factor {s.spikes.factor:g})" if np.isfinite(loss + norm) else "not finite"
        raise DivergedError(
            f"step {step}: loss {loss} and gradient norm {norm} are {why}, {skipped} steps in a row "
            f"(max_skipped {s.max_skipped}); they changed no weight",
            skipped,
        )
    if skipped:
        spikes = f", {int(metrics['spikes'])} of them spikes" if "spikes" in metrics else ""
        tell(f"step {step} was skipped: {int(metrics['skipped_total'])} in all{spikes}", sys.stderr)
    if meter.seen(step):  # Rates and ETA from here on: the first step was compiled.
        bar.initial, bar.start_t = step, time.time()
        bar.last_print_t = bar.start_t
    if not _due(step, s.log_every):
        return
    values = {name: float(value) for name, value in metrics.items()} | meter.rates(step)
    # A kind of row that this step happened to have none of has no loss.
    values = {name: v for name, v in values.items() if not (name.startswith("loss/") and np.isnan(v))}
    outputs.log.scalars(step, values)
    progress.saw(values["loss"])
    progress.rate = values.get("images_per_second")
    rate = {"img_s": f"{values['images_per_second']:.0f}"} if "images_per_second" in values else {}
    bar.set_postfix(loss=f"{values['loss']:.4f}", **rate)


def save(
    step: int,
    assembly: Assembly,
    outputs: Outputs,
    state: TrainState,
    metrics: dict[str, jax.Array],
    last: bool = False,
    stopping: bool = False,
    stopped: int = 0,
) -> None:
    """Starts a checkpoint of a state that is known to be finite; the last one of a run is waited for.

    Where it fails and the run is `stopping` after a signal, that is only told: starting again is what helps. A run that
    was `stopped` by so many skipped steps says so in what is stored.
    """
    if not np.isfinite(float(metrics["param_norm"])):
        raise TrainingError(f"step {step}: the weights are not finite, so they were not saved")
    if step in outputs.checkpoints.steps():
        return
    try:
        meta = meta_of(step, assembly, state, outputs.base, stopped)
        outputs.checkpoints.save(step, to_items(state), meta, surely=last)
    except CheckpointError as error:
        if not stopping:
            raise
        LOGGER.error(str(error))


def validate(step: int, s: Settings, validation: Validation, log: MetricLog, state: TrainState) -> None:
    """Logs and tells the loss on held-out images, by the rule that its name tells."""
    for view in s.validation.views:
        name = f"validation/{s.validation.rule}/{view}"
        values = validation(choose_view(state, view), name)
        log.scalars(step, values)
        tell(f"step {step}: {name} {values[name]:.4f} ({validation.num_images:,} images)")


def show(step: int, s: Settings, outputs: Outputs, state: TrainState) -> None:
    """Draws the sample grid into the log and the workdir."""
    image = outputs.draw_grid(choose_view(state, s.eval.view))
    outputs.log.image(step, f"samples/{s.eval.view}", image)
    if jax.process_index() == 0:
        path = outputs.workdir / grid_name(step)
        try:
            path.parent.mkdir(exist_ok=True)
            image.save(path)
        except OSError as error:  # a full disk takes no image, but stops no run
            LOGGER.warning("the sample grid of step %d is not written: %s", step, error)


def tell(line: str, file: TextIO | None = None) -> None:
    """Prints a line above the progress bar, from process 0 only; every process has it in its log."""
    LOGGER.info(line)
    if jax.process_index() == 0:
        tqdm.write(line, file=file)


def grid_name(step: int) -> str:
    """The sample grid of a step, in the workdir."""
    return f"samples/step_{step:08d}.png"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
