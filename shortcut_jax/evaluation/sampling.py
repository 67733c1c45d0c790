"""Making the images of an evaluation: cell by cell, in batches over all devices, kept as it goes."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from shortcut_jax.cluster import distributed
from shortcut_jax.evaluation.accumulators import Tally, add, load, no_tally, of_all_processes, save
from shortcut_jax.evaluation.captions import CaptionBatch
from shortcut_jax.evaluation.features import Features
from shortcut_jax.evaluation.metrics import Cell
from shortcut_jax.evaluation.subjects import Subject

SAVE_SECONDS = 30.0


Classify = Callable[[np.ndarray], np.ndarray]
"""Images [S, h, w, c], uint8 -> classes [S]."""


class Judges(NamedTuple):
    """What looks at each image.

    Attributes:
      features: of images.
      clip: (images, captions) -> the CLIP score of each; None without CLIP.
      classify: images -> classes; None where the data has none.
      pixels: features that are the images themselves, whose distance is reported beside that of `features`; or None.
    """

    features: Features
    clip: Callable[[np.ndarray, Sequence[str]], np.ndarray] | None = None
    classify: Classify | None = None
    pixels: Features | None = None


def sample_cell(
    subject: Subject,
    weights: Any,
    asks: Subject,
    cell: Cell,
    seed: int,
    judges: Judges,
    path: Path,
    bar: tqdm,
) -> Tally:
    """Makes the images of a cell, or those that an earlier run of it has not made.

    Image i has caption i and noise i of the seed, whatever the devices and the batch. Each process looks at its share
    of every batch; what all have seen is written to `path` now and then, and at the end.

    Args:
      subject: what is judged.
      weights: of it, on devices.
      asks: whose captions they are.
      cell: which weights, steps and how many.
      seed: of the noise.
      judges: what looks at them.
      path: of the cell's file.
      bar: progress, in network evaluations.
    """
    rank, processes = jax.process_index(), jax.process_count()
    asked_by = f"captions of {asks.name} | {cell} | {cell.images} images | seed {seed}"
    looked_at = " | ".join(f.identity for f in (judges.features, judges.pixels) if f)
    key = f"{subject.identity} | {asked_by} | {looked_at}"
    stored = load(path, key)
    done = distributed.agree_on(stored.done if stored else 0)
    empty = no_tally(judges.features.size, judges.pixels.size if judges.pixels else 0)._replace(done=done)
    # What is stored is of all processes: one of them continues with it.
    tally = stored if stored and rank == 0 else empty
    bar.update(done * cell.steps)
    if done == cell.images:
        return of_all_processes(tally)
    saved = time.monotonic()
    for first in range(done, cell.images, subject.batch_size):
        indices = np.arange(first, min(first + subject.batch_size, cell.images))
        asked = asks.ask(indices.tolist(), cell.images)
        begin = time.perf_counter()
        images = subject.images(weights, asked, cell.steps, seed, first)
        seconds = (time.perf_counter() - begin) * (rank == 0)
        mine = np.arange(rank, len(indices), processes)
        sums = {"seconds": seconds, **_look(judges, asked, images, mine)}
        done = int(indices[-1]) + 1
        features = judges.features(images[mine]) if len(mine) else np.zeros((0, judges.features.size), np.float32)
        flat = judges.pixels(images[mine]) if judges.pixels and len(mine) else None
        tally = add(tally, indices[mine], features, sums, done, flat)
        bar.update(len(indices) * cell.steps)
        if done < cell.images and distributed.agree(time.monotonic() - saved > SAVE_SECONDS):
            tally, saved = _keep(tally, empty, path, key), time.monotonic()
    return _keep(tally, None, path, key)


def _keep(tally: Tally, empty: Tally | None, path: Path, key: str) -> Tally:
    """Writes what all processes have seen. Process 0 continues with it, the others with `empty`; all, where None."""
    whole = of_all_processes(tally)
    if jax.process_index() == 0:
        save(path, whole, key)
    if empty is None or jax.process_index() == 0:
        return whole
    return empty._replace(done=whole.done)


def _look(judges: Judges, asked: CaptionBatch, images: np.ndarray, mine: np.ndarray) -> dict[str, float]:
    sums: dict[str, float] = {}
    if not len(mine):
        return sums
    if judges.classify and asked.labels is not None:
        hits = judges.classify(images[mine]) == asked.labels[mine]
        sums |= {"classified": float(hits.sum()), "labelled": float(len(mine))}
    if judges.clip:
        scores = judges.clip(images[mine], [asked.captions[i] for i in mine])
        squares = float((np.asarray(scores, np.float64) ** 2).sum())
        sums |= {"clip": float(scores.sum()), "clip_squares": squares, "captioned": float(len(mine))}
    return sums


def latencies(make: Callable[[int], np.ndarray], steps: Sequence[int], repeats: int = 3) -> dict[int, float]:
    """Seconds of `make(steps)`, the median of some calls in turns, after one that may compile."""
    times: dict[int, list[float]] = {n: [] for n in steps}
    make(1)
    for _ in range(repeats):
        for n in steps:
            begin = time.perf_counter()
            make(n)
            times[n].append(time.perf_counter() - begin)
    return {n: float(np.median(values)) for n, values in times.items()}
