"""The input pipeline: grain, deterministic, resumed from the step number alone.

Row r of step k is one sample of an endless shuffled stream of its bucket, at a place that `BatchSchedule` knows from k
alone, and its random draws belong to that place. So a batch depends on neither the number of processes, threads or
workers nor on where a run was interrupted.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import grain
import numpy as np

from shortcut_jax.core.types import Batch
from shortcut_jax.data.arrays import first_line
from shortcut_jax.data.format import LatentInfo, unpack_text
from shortcut_jax.data.records import EncodeText, fold, latent_size, stride_of, to_latents
from shortcut_jax.data.schedule import BatchSchedule
from shortcut_jax.data.stored import Records
from shortcut_jax.data.training import TrainingData
from shortcut_jax.errors import DataError

T = TypeVar("T")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_SEED_STRIDE = 1_000_003
"""Apart enough that no two streams of a run share a seed, nor do streams and their draws."""


class Draw(NamedTuple):
    """One sample of a stream: which record, and what chance makes of it.

    Attributes:
      set: of the run's sets.
      record: of the set.
      drop: whether the caption is replaced by the empty one.
      flip: whether the image is mirrored.
      seed: of the noise that draws latents from their Gaussian.
    """

    set: int
    record: int
    drop: bool
    flip: bool
    seed: int


class _Places:
    """The records of one set in one bucket, as a source of grain."""

    def __init__(self, which: int, records: np.ndarray):
        self._which, self._records = which, records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self._which, int(self._records[index])


class _DrawAll(grain.transforms.RandomMap):
    """Draws a sample's chances, by its place in the stream."""

    def __init__(self, caption_dropout: float, flip: float):
        self._caption_dropout, self._flip = caption_dropout, flip

    def random_map(self, place: tuple[int, int], rng: np.random.Generator) -> Draw:
        drop, flip = rng.random() < self._caption_dropout, rng.random() < self._flip
        return Draw(*place, drop, flip, int(rng.integers(2**63)))


def make_streams(data: TrainingData, seed: int) -> list[grain.MapDataset | None]:
    """The endless stream of `Draw`s of each bucket: every set shuffled anew each time through, mixed by weight."""
    settings, streams = data.settings, list[Any]()
    for bucket, row in enumerate(data.places):
        own = seed + bucket * _SEED_STRIDE
        parts, weights = [], []
        for which, records in enumerate(row):
            if len(records):
                shuffled = grain.MapDataset.source(_Places(which, records)).shuffle(seed=(own + 2 * which) % 2**32)
                parts.append(shuffled.repeat())
                weights.append(float(data.shares[bucket, which]))
        if not parts:
            streams.append(None)  # which no batch asks for
            continue
        mixed = grain.MapDataset.mix(parts, weights) if len(parts) > 1 else parts[0]
        draws = _DrawAll(settings.caption_dropout, settings.flip)
        streams.append(mixed.random_map(draws, seed=(own + 1) % 2**32))
    return streams


class BatchReader:
    """Step -> the given rows of its global batch. It can be sent to worker processes."""

    def __init__(
        self,
        data: TrainingData,
        encode_text: EncodeText,
        rows: np.ndarray,
        global_batch: int,
        seed: int,
        channels: int = 0,
    ):
        """Nothing is read yet.

        Args:
          data: the sets.
          encode_text: of captions whose states are not stored.
          rows: the global rows that this process needs (`runtime.sharding.process_rows`).
          global_batch: G, rows of a global batch.
          seed: of order and chances.
          channels: of a latent, for sets of captions alone.
        """
        self.schedule = BatchSchedule(data.epoch_sizes, global_batch, seed)
        self._streams = make_streams(data, seed)
        self._records, self._names = [s.records for s in data.sets], [s.name for s in data.sets]
        self._sizes = [latent_size(data.settings, size) for size in data.buckets]
        self._to_row = RowMaker(data, encode_text, channels)
        self._rows = rows

    def draws(self, step: int) -> list[Draw]:
        """The samples of a step, one a row."""
        entry = self.schedule.entry(step)
        stream: Any = self._streams[entry.bucket]
        return [stream[entry.first + int(row)] for row in self._rows]

    def __call__(self, step: int) -> Batch:
        """The rows of a step, in order."""
        draws = self.draws(int(step))
        records: list[Any] = [None] * len(draws)
        for which in {draw.set for draw in draws}:
            at = [i for i, draw in enumerate(draws) if draw.set == which]
            for i, record in zip(at, read_many(self._records[which], [draws[i].record for i in at]), strict=True):
                records[i] = record
        size = self._sizes[self.schedule.entry(int(step)).bucket]
        return stack_rows([self._row(record, draw, size) for record, draw in zip(records, draws, strict=True)])

    def _row(self, record: dict[str, Any], draw: Draw, size: tuple[int, int]) -> Batch:
        try:
            row = self._to_row(record, draw)
            found = row.latents_BhwC.shape[:2]
            if found != size:
                raise ValueError(f"its latents are {found[0]} x {found[1]}, those of its bucket {size[0]} x {size[1]}")
            return row
        except Exception as error:  # whatever a record holds that it should not
            records = self._records[draw.set]
            place = records.place(draw.record) if isinstance(records, Records) else f"record {draw.record:,}"
            raise DataError(
                f"{place} of the set {self._names[draw.set]!r} cannot be used ({first_line(error)}): prepare it again"
            ) from error


def evenly(total: int, most: int) -> list[int]:
    """At most so many of `total` places, evenly spread from the first to the last."""
    return np.linspace(0, total - 1, min(most, total)).round().astype(int).tolist()


def read_many(records: Any, indices: list[int]) -> list[Any]:
    """Several records at once, as fast as the source can."""
    many = getattr(records, "__getitems__", None)
    return list(many(indices)) if many else [records[i] for i in indices]


def stack_rows(rows: list[Batch]) -> Batch:
    """Samples as one batch."""
    return Batch(*(np.stack(leaves) for leaves in zip(*rows, strict=True)))


class RowMaker:
    """A record and its draw -> one sample as a `Batch` row."""

    def __init__(self, data: TrainingData, encode_text: EncodeText, channels: int = 0):
        """See `BatchReader`."""
        info, settings = data.info, data.settings
        self._block = stride_of(settings)
        self._nothing = None
        if settings.store == "captions":  # no row looks at latents
            self._nothing = np.zeros((*latent_size(settings), channels), np.float32)
        self._latents = info.latents if info and info.store == "latents" else None
        self._encode_text = encode_text
        self._stored = data.settings.text_encoder == "stored"
        self._texts = [s.info.text if s.info else None for s in data.sets]  # mixed sets may differ in their dtype
        self._empty = data.prompts[""] if self._stored else None

    def __call__(self, record: dict[str, Any], draw: Draw) -> Batch:
        """Latents [h, w, c] float32, txt [M, T], vec [V]."""
        if self._nothing is not None:
            latents = self._nothing
        elif self._latents:
            latents = draw_latents(record["mean"], record["std"], draw.seed, self._latents)
        else:
            image = record["image"][:, ::-1] if draw.flip else record["image"]
            latents = fold(to_latents(image), self._block)
        return Batch(latents, *self._states(record, draw))

    def _states(self, record: dict[str, Any], draw: Draw) -> tuple[np.ndarray, np.ndarray]:
        text = self._texts[draw.set]
        if not self._stored or text is None:
            return self._encode_text("" if draw.drop else record["caption"].decode("utf-8"))
        if draw.drop and self._empty is not None:
            return self._empty
        return unpack_text(record, text), record["vec"]


def draw_latents(mean_hwc: np.ndarray, std_hwc: np.ndarray, seed: int, info: LatentInfo) -> np.ndarray:
    """Latents as the network sees them, float32, drawn from the Gaussian that the autoencoder gives an image."""
    random = np.random.Generator(np.random.SFC64(seed))
    noise_hwc = random.standard_normal(mean_hwc.shape, np.float32)
    noise_hwc *= std_hwc
    noise_hwc += mean_hwc
    noise_hwc -= np.float32(info.shift)
    noise_hwc *= np.float32(info.scale)
    return noise_hwc


def batches(
    reader: Callable[[int], T], start: int, stop: int, threads: int = 1, workers: int = 0
) -> Generator[T, None, None]:
    """What `reader` reads for the steps `start` ... `stop - 1`, in order, read ahead by threads or processes.

    Close it where it is not read to its end: its processes and their shared memory end with it.
    """
    read = _Steps(reader)
    steps = grain.MapDataset.range(start, stop).map(read)
    stream = steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * threads, 4)))
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # grain's workers ask for flags of its own
            flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
    iterator: Any = iter(stream)
    try:
        yield from iterator
    finally:
        iterator.close()


class _Steps(grain.transforms.Map):
    """A reader as a transform that worker processes can be given."""

    def __init__(self, reader: Callable[[int], Any]):
        self._reader = reader

    def map(self, step: int) -> Any:
        _keep_memory()
        return self._reader(int(step))


@functools.cache
def _keep_memory() -> None:
    """Lets the C library keep the memory of batches that are done with, up to a gigabyte, for the next ones.

    By default it returns and asks for it each time, and the kernel clears every page: a third of the time of a batch.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        libc = ctypes.CDLL("libc.so.6")
        for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            libc.mallopt(parameter, 2**30)


def ahead(items: Iterable[T], num: int = 1) -> Iterator[T]:
    """The items in order, each asked for `num` items before it is taken: transfers run beside the step before."""
    iterator = iter(items)
    waiting = list(islice(iterator, num))
    for item in iterator:
        waiting.append(item)
        yield waiting.pop(0)
    yield from waiting
