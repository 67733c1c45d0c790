"""The input pipeline: grain, deterministic, resumed from the step number alone.

Sample k G + r of an endless shuffled stream is row r of step k for a global batch of G rows, so a batch depends on
neither the number of processes nor on where a run was interrupted.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from shortcut_jax.core.types import Batch
from shortcut_jax.data.records import to_latents

EncodeText = Callable[[str], tuple[np.ndarray, np.ndarray]]
"""caption -> txt [M, T], vec [V]."""


class _DropCaption(grain.transforms.RandomMap):
    """Replaces captions by the empty one, whole, with a fixed probability, by sample index."""

    def __init__(self, probability: float):
        self._probability = probability

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        caption = element["caption"].decode("utf-8")
        return {**element, "caption": "" if rng.random() < self._probability else caption}


def make_samples(
    source: Sequence[dict[str, Any]], encode_text: EncodeText, caption_dropout: float, seed: int, limit: int = 0
) -> grain.MapDataset:
    """The endless stream of single samples as `Batch` rows: shuffled anew each epoch, captions dropped at random.

    Only the first `limit` records are used; 0 means all.
    """

    def to_row(element: dict[str, Any]) -> Batch:
        txt, vec = encode_text(element["caption"])
        return Batch(to_latents(element["image"]), txt, vec)

    records = grain.MapDataset.source(source)
    samples = (records[:limit] if limit else records).shuffle(seed=seed).repeat()
    return samples.random_map(_DropCaption(caption_dropout), seed=seed + 1).map(to_row)


def batches(samples: grain.MapDataset, rows: np.ndarray, global_batch: int, start: int, stop: int) -> Iterator[Batch]:
    """The given rows of the batches of steps `start` ... `stop - 1`, read ahead in threads.

    Args:
      samples: `make_samples`.
      rows: the global rows this process needs (`runtime.sharding.process_rows`).
      global_batch: G, rows of a global batch.
      start: first step.
      stop: step after the last.
    """

    def read(step: int) -> Batch:
        parts = [samples[int(step) * global_batch + int(row)] for row in rows]
        return Batch(*(np.stack(leaves) for leaves in zip(*parts, strict=True)))

    steps = grain.MapDataset.range(start, stop).map(read)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
