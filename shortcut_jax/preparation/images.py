"""From captioned images to records: decoded in threads, brought to their buckets, encoded in batches."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from shortcut_jax.data.buckets import nearest
from shortcut_jax.data.format import Size
from shortcut_jax.data.images import BadImage, decode, encode_png, fit, read_image
from shortcut_jax.errors import DataError
from shortcut_jax.preparation.inputs import Item, Source
from shortcut_jax.preparation.units import UNUSED, Record, Skip, Unit, Unused, stamp

FURTHER = f"{UNUSED}further captions of an image: the first one of a list is used"


class Cropped(NamedTuple):
    """A captioned image in its bucket.

    Attributes:
      key: of its record.
      caption: of its record.
      height: that it had.
      width: that it had.
      pixels: [h, w, 3] uint8, of its bucket.
      further: captions that it had besides.
      watched: see `Record`.
    """

    key: str
    caption: str
    height: int
    width: int
    pixels: np.ndarray
    further: int = 0
    watched: tuple[str, str] | None = None


class Encode(Protocol):
    """Makes of images what a record holds.

    Attributes:
      batch_size: the most images at once.
    """

    batch_size: int

    def __call__(self, images: Sequence[Cropped]) -> list[tuple[dict[str, Any], dict[str, float]]]:
        """For each of the images, all of one bucket: the further fields of its record, and its `Record.sums`."""
        ...

    def bytes_per_record(self, size: Size) -> int:
        """About the least that a record of a bucket takes on the disk."""
        ...


class PixelEncoder:
    """Images as PNG, encoded by a pool of threads.

    Attributes:
      batch_size: 64, less of large images: a batch of each bucket waits in memory.
    """

    def __init__(self, buckets: Sequence[Size], pool: ThreadPoolExecutor):
        """Takes the sizes of the images, and the threads."""
        self._pool = pool
        self.batch_size = max(1, min(64, 2**24 // max(3 * h * w for h, w in buckets)))

    def __call__(self, images: Sequence[Cropped]) -> list[tuple[dict[str, Any], dict[str, float]]]:
        """See `Encode`."""
        return [({"image": data}, {}) for data in self._pool.map(encode_png, [p.pixels for p in images])]

    def bytes_per_record(self, size: Size) -> int:
        """A quarter of a byte a pixel: flat drawings take that little, photographs six times as much."""
        return math.prod(size) // 4 + 100


def make_pool() -> ThreadPoolExecutor:
    """Threads for decoding, one a core."""
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="images")


def producer(
    source: Source, buckets: Sequence[Size], encode: Encode, pool: ThreadPoolExecutor, enlarge: bool = True
) -> Callable[[Unit], Iterator[Record | Skip | Unused]]:
    """Unit -> its records, in an order that depends on nothing but the unit.

    Args:
      source: of the images.
      buckets: sizes, the nearest of which an image is brought to.
      encode: makes records of them.
      pool: threads that decode.
      enlarge: whether an image that is smaller than its bucket is enlarged (and counted) or left out.
    """

    def produce(unit: Unit) -> Iterator[Record | Skip | Unused]:
        waiting: dict[int, list[tuple[Cropped, bool]]] = {}
        read = lambda item: _read(item, buckets, enlarge) if isinstance(item, Item) else item
        for result in _in_order(pool, read, _items(source, unit)):
            if isinstance(result, Skip | Unused):
                yield result
                continue
            bucket, image, enlarged = result
            batch = waiting.setdefault(bucket, [])
            batch.append((image, enlarged))
            if len(batch) == encode.batch_size:
                yield from _encoded(bucket, waiting.pop(bucket), encode)
        for bucket in sorted(waiting):
            yield from _encoded(bucket, waiting[bucket], encode)

    return produce


def _items(source: Source, unit: Unit) -> Iterator[Item | Skip | Unused]:
    """The items of a unit; that a source cannot be read is not to be taken for a failure of what is written."""
    try:
        yield from source.items(unit)
    except OSError as error:
        what = error.strerror or str(error)
        raise DataError(f"{error.filename or unit.name} cannot be read: {what}; what is done is kept") from error


def _read(item: Item, buckets: Sequence[Size], enlarge: bool) -> tuple[int, Cropped, bool] | Skip:
    path = item.image if isinstance(item.image, Path) else None
    before = stamp(path) if path else ""
    watched = (str(path), before) if path else None
    try:
        image = decode(read_image(path) if path else item.image)  # type: ignore[arg-type]  # bytes, where no path
    except BadImage as error:
        # What may not be read now may be readable the next time, though the file is the same.
        watched = (str(path), "") if path and error.reason == "unreadable file" else watched
        return Skip(item.key, error.reason, error.detail, watched)
    bucket = nearest(buckets, image.height, image.width)
    height, width = buckets[bucket]
    if not enlarge and (image.height < height or image.width < width):
        return Skip(item.key, "too small", f"{image.height} x {image.width} for {height} x {width}", watched)
    pixels, enlarged = fit(image, buckets[bucket])
    return bucket, Cropped(item.key, item.caption, image.height, image.width, pixels, item.further, watched), enlarged


def _encoded(bucket: int, batch: Sequence[tuple[Cropped, bool]], encode: Encode) -> Iterator[Record]:
    encoded = encode([image for image, _ in batch])
    for (image, enlarged), (fields, sums) in zip(batch, encoded, strict=True):
        told = {"key": image.key, "caption": image.caption, "height": image.height, "width": image.width}
        further = {FURTHER: image.further} if image.further else {}
        yield Record(bucket, told | fields, {**sums, **further, "enlarged": int(enlarged)}, image.watched)


def _in_order(pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """The function's values in the order of the items, a few of which are worked on ahead."""
    ahead: deque[Future[Any]] = deque()
    limit = 4 * pool._max_workers
    try:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) >= limit:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()
