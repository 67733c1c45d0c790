"""The work of `prepare`: from its options to a set, one function for each kind of set."""

import contextlib
import os
import signal
import sys
import time
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortcut_jax.cluster import distributed
from shortcut_jax.cluster.claim import Claim, Member, Times
from shortcut_jax.data.buckets import parse_buckets
from shortcut_jax.data.format import Size
from shortcut_jax.data.text_file import read_lines
from shortcut_jax.errors import UsageError
from shortcut_jax.preparation.images import Encode, PixelEncoder, make_pool, producer
from shortcut_jax.preparation.inputs import Source, SourceOptions, open_source
from shortcut_jax.preparation.job import Job, Produce
from shortcut_jax.preparation.progress import summary
from shortcut_jax.preparation.writing import already_written, captions_hash, units_done, write_units
from shortcut_jax.sources.models import with_strengths

DEFAULT_UNIT = 4096
"""Items of a unit of work."""

PIXEL_MULTIPLE = 2
"""Sides of an image that is trained on as pixels: a token is 2 x 2 of them."""


@dataclass(frozen=True)
class Processes:
    """The processes that work on a set: this one's index, and how many there are."""

    index: int
    count: int


class Stopped(KeyboardInterrupt):
    """A signal, its argument, that asks the command to stop."""


def source_options(options: types.SimpleNamespace) -> SourceOptions:
    """How the source is read."""
    where = tuple(options.where or ())
    fields = options.caption_field, options.template
    return SourceOptions(options.unit or DEFAULT_UNIT, where, *fields, options.tfds_dir, options.layout)


def prepare(options: types.SimpleNamespace, processes: Processes) -> int:
    """Prepares the set that the options describe; says what came of it."""
    prompts = read_prompts("eval_prompts", options.eval_prompts)
    say = _say if processes.index == 0 else lambda line: None
    try:
        source = open_source(options.source, source_options(options), say)
    except OSError as error:
        what = error.strerror or str(error)
        raise UsageError(f"--source={options.source} cannot be read: {error.filename or ''}: {what}") from error
    with contextlib.closing(_Pool()) as held:
        pool = held.pool
        buckets, encode, fields = make_store(options, pool)
        least = min(encode.bytes_per_record(size) for size in buckets)
        job = Job(
            out=Path(options.out),
            request=request_of(options, source, buckets, prompts) | fields.pop("request", {}),
            store=options.store,
            buckets=buckets,
            units=source.units,
            num_items=source.num_items,
            bytes_per_record=least,
            validation=options.validation,
            max_skipped=options.max_skipped,
            unused=source.unused,
            eval_prompts=prompts,
            **fields,
        )
        return write(job, producer(source, buckets, encode, pool, options.enlarge), processes)


def prepare_from_teacher(options: types.SimpleNamespace, processes: Processes) -> int:
    """Prepares a set that a checkpoint samples; says what came of it."""
    from shortcut_jax.preparation.teacher import TeacherData, TeacherSettings

    captions = read_prompts("eval_prompts", options.eval_prompts)
    prompts = read_prompts("prompts", options.prompts) or ()
    loras = with_strengths(options.lora, options.lora_scale)
    buckets = parse_buckets(options.buckets, options.resolution, multiple_of(options))
    named = {n: getattr(options, n) for n in ("per_bucket", "steps", "guidance", "seed", "text_tokens", "text_dtype")}
    settings = TeacherSettings(prompts, buckets, per_device=options.batch or 1, unit=options.unit or 512, **named)
    teacher = TeacherData(options.from_teacher, settings, loras)
    report_cuts(teacher, prompts)
    distributed.say(f"{teacher.pipeline.guidance(options.guidance)}; {options.steps} steps")
    job = Job(
        out=Path(options.out),
        store="latents",
        buckets=buckets,
        units=teacher.units,
        num_items=len(buckets) * options.per_bucket,
        bytes_per_record=min(teacher.bytes_per_record(size) for size in buckets),
        validation=options.validation,
        max_skipped=options.max_skipped,
        eval_prompts=captions,
        **teacher.job_fields(
            **teacher.request(), store="latents", validation=options.validation, eval_prompts=captions_hash(captions)
        ),
    )
    return write(job, teacher, processes)


def prepare_captions(options: types.SimpleNamespace, processes: Processes) -> int:
    """Prepares a set of captions with their text states, without images; says what came of it."""
    from shortcut_jax.preparation.latents import CaptionEncoder

    drawn = read_prompts("eval_prompts", options.eval_prompts)
    captions = read_prompts("prompts", options.prompts) or ()
    text = options.text_states, options.text_tokens, options.text_dtype
    unit = options.unit or DEFAULT_UNIT
    encoder = CaptionEncoder(options.checkpoint, captions, *text, options.batch or 8, unit)
    report_cuts(encoder, captions)
    asked = {"prompts": captions_hash(captions), "store": "captions", "unit": unit}
    job = Job(
        out=Path(options.out),
        store="captions",
        buckets=((1, 1),),
        units=encoder.units,
        num_items=len(captions),
        bytes_per_record=encoder.bytes_per_record((0, 0)),
        validation=options.validation,
        max_skipped=options.max_skipped,
        eval_prompts=drawn,
        **encoder.job_fields(**asked, validation=options.validation, eval_prompts=captions_hash(drawn)),
    )
    return write(job, encoder, processes)


def report_cuts(maker: Any, captions: Sequence[str]) -> None:
    """Says which captions are too long for the text encoders."""
    cuts = maker.text.cuts(captions, maker.text_info.tokens)
    for line in (*cuts[:3], *([f"{len(cuts):,} captions are cut in all"] if len(cuts) > 3 else ())):
        distributed.say(line)


def write(job: Job, produce: Produce, processes: Processes) -> int:
    """Writes a set, or the rest of one; says what came of it. Returns the exit code."""
    say = _say if processes.index == 0 else lambda line: None
    start = time.monotonic()
    if already_written(job):
        say(f"{job.out} is there already, prepared with these arguments")
        return 0
    try:
        job.out.parent.mkdir(parents=True, exist_ok=True)
        with _signals(), claim(job.out, processes) as held:
            held.take()
            info = write_units(job, produce, processes.index, processes.count, say=say)
    except Stopped as stop:
        say(f"interrupted: {units_done(job):,} of {len(job.units):,} units are done; rerun the same command to resume")
        return distributed.EXIT_CODES[stop.args[0]]
    for line in summary(info, job.out, time.monotonic() - start):
        say(line)
    return 0


def claim(out: Path, processes: Processes, times: Times | None = None) -> Claim:
    """The claim on a set that is being written: beside it, for it is a folder only when it is complete.

    Processes that make pixels do not know each other, so each holds its part.
    """
    path_of = lambda index: out.with_name(f".{out.name}.claim-{index}.json")
    group = f"{os.environ.get('JAX_COORDINATOR_ADDRESS')} {processes.count}"
    return Claim(out, "--out", Member(path_of(processes.index), path_of(0), group), times)


def join(store: str) -> Processes:
    """Which of how many processes this is; JAX is started only where it is needed or has to be asked."""
    number, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    if not os.environ.get("JAX_COORDINATOR_ADDRESS"):
        return Processes(0, 1)
    if store == "pixels" and number and index:
        return Processes(int(index), int(number))
    import jax

    distributed.initialize()
    return Processes(jax.process_index(), jax.process_count())


def make_store(
    options: types.SimpleNamespace, pool: ThreadPoolExecutor
) -> tuple[tuple[Size, ...], Encode, dict[str, Any]]:
    """The buckets, what makes records of images, and fields of `Job` that depend on it (with `request`)."""
    buckets = parse_buckets(options.buckets, options.resolution, multiple_of(options))
    if options.store == "latents":
        return buckets, *make_encoder(options, buckets)
    return buckets, PixelEncoder(buckets, pool), {}


def make_encoder(options: types.SimpleNamespace, buckets: tuple[Size, ...]) -> tuple[Encode, dict[str, Any]]:
    """The encoders of a set of latents, and the fields of `Job` that tell of them.

    Raises:
      DataError: a size that the autoencoder cannot encode.
      ConvertedError: the checkpoint lacks a model, or cannot be read.
    """
    from shortcut_jax.preparation.latents import LatentEncoder, check_sizes

    encoder = LatentEncoder(
        options.checkpoint, options.text_states, options.text_tokens, options.text_dtype, options.batch or 8
    )
    check_sizes(buckets, encoder.latents.stride)
    return encoder, encoder.job_fields()


def multiple_of(options: types.SimpleNamespace) -> int:
    """What the sides of buckets are multiples of; of latents the autoencoder has the last word."""
    return PIXEL_MULTIPLE if "x" in options.buckets else 16


def request_of(
    options: types.SimpleNamespace, source: Source, buckets: Sequence[Size], prompts: Sequence[str] | None
) -> dict[str, Any]:
    """What determines the content of a set."""
    path = Path(options.source)
    return {
        "source": str(path.resolve()) if path.exists() else options.source,
        "fingerprint": source.fingerprint,
        "store": options.store,
        "buckets": [f"{h}x{w}" for h, w in buckets],
        "enlarge": options.enlarge,
        "validation": options.validation,
        "eval_prompts": captions_hash(prompts),
        "where": list(options.where or ()),
        "caption_field": options.caption_field,
        "template": options.template,
        "unit": options.unit or DEFAULT_UNIT,
    }


def read_prompts(name: str, path: str | None) -> tuple[str, ...] | None:
    """The captions in the file of an option, each once; None without a file. Raises DataError, see `read_lines`."""
    return None if path is None else tuple(dict.fromkeys(read_lines(path, f"--{name}={path}", "caption")))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class _Pool:
    """Threads that are not waited for when the command stops."""

    def __init__(self) -> None:
        self.pool = make_pool()

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM stop the work wherever it is: it is written so that it can be."""

    def stop(number: int, frame: types.FrameType | None) -> None:
        del frame
        raise Stopped(signal.Signals(number))

    previous = {which: signal.signal(which, stop) for which in distributed.EXIT_CODES}
    try:
        yield
    finally:
        for which, handler in previous.items():
            signal.signal(which, handler)
