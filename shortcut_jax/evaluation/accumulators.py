"""What is kept of the images of one cell of an evaluation: sums and a bounded sample, in a file that survives."""

import os
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax
import numpy as np

from shortcut_jax.core.stats import (
    Moments,
    Reservoir,
    add_moments,
    add_to_reservoir,
    merge_moments,
    merge_reservoirs,
    no_moments,
    no_reservoir,
)

RESERVOIR, RESERVOIR_SEED = 10_000, 0
"""Features that are kept for KID, precision and recall, and the seed of their choice."""

SUMS = ("classified", "labelled", "clip", "clip_squares", "captioned", "seconds")
"""Names of what is added up beside the features."""


class Tally(NamedTuple):
    """Of the first `done` images of a cell.

    Attributes:
      moments: of their features.
      reservoir: a sample of their features that depends on their numbers only.
      sums: see `SUMS`.
      done: how many there were.
      pixels: moments of the images themselves, where they are asked for; else of no values.
    """

    moments: Moments
    reservoir: Reservoir
    sums: dict[str, float]
    done: int
    pixels: Moments


def no_tally(size: int, pixels: int = 0) -> Tally:
    """Of no images, features of `size` values, and of `pixels` values of an image."""
    return Tally(no_moments(size), no_reservoir(RESERVOIR, size), dict.fromkeys(SUMS, 0.0), 0, no_moments(pixels))


def add(
    tally: Tally,
    indices: np.ndarray,
    features: np.ndarray,
    sums: dict[str, float],
    done: int,
    pixels: np.ndarray | None = None,
) -> Tally:
    """With images `indices` [S], their features [S, F], sums and pixels [S, P]; `done` images are then known."""
    return Tally(
        add_moments(tally.moments, features),
        add_to_reservoir(tally.reservoir, indices, features, RESERVOIR_SEED),
        {k: v + sums.get(k, 0.0) for k, v in tally.sums.items()},
        done,
        tally.pixels if pixels is None else add_moments(tally.pixels, pixels),
    )


def merge(parts: list[Tally]) -> Tally:
    """One of several that have seen different images; all know of as many as done."""
    whole = parts[0]
    for part in parts[1:]:
        moments = merge_moments(whole.moments, part.moments)
        reservoir = merge_reservoirs(whole.reservoir, part.reservoir)
        sums = {k: v + part.sums[k] for k, v in whole.sums.items()}
        whole = Tally(moments, reservoir, sums, whole.done, merge_moments(whole.pixels, part.pixels))
    return whole


def of_all_processes(tally: Tally) -> Tally:
    """The tallies of all processes as one, the same on each of them."""
    if jax.process_count() == 1:
        return tally
    from jax.experimental import multihost_utils

    # As bytes: JAX would make float32 of float64. Of equal length: a process may have sampled fewer rows than another.
    arrays = _to_arrays(tally)
    gather = lambda value: np.asarray(multihost_utils.process_allgather(value)).reshape(jax.process_count(), -1)
    rows = gather(np.array([len(tally.reservoir.rank_S)], np.int32))[:, 0]
    gathered: dict[str, list[np.ndarray]] = {}
    for name, value in arrays.items():
        sampled = name.startswith("reservoir") and value.ndim > 0
        if sampled:
            value = np.concatenate([value, np.zeros((rows.max() - len(value), *value.shape[1:]), value.dtype)])
        raw = gather(np.frombuffer(value.tobytes(), np.uint8))
        parts = [np.frombuffer(one.tobytes(), value.dtype).reshape(value.shape) for one in raw]
        gathered[name] = [part[:n] for part, n in zip(parts, rows, strict=True)] if sampled else parts
    return merge([_from_arrays({k: v[i] for k, v in gathered.items()}) for i in range(len(rows))])


def _to_arrays(tally: Tally) -> dict[str, np.ndarray]:
    arrays = {f"moments_{k}": np.asarray(v) for k, v in tally.moments._asdict().items()}
    arrays |= {f"reservoir_{k}": np.asarray(v) for k, v in tally.reservoir._asdict().items()}
    arrays |= {f"pixels_{k}": np.asarray(v) for k, v in tally.pixels._asdict().items()}
    return arrays | {"sums": np.array([tally.sums[k] for k in SUMS]), "done": np.array(tally.done)}


def _from_arrays(arrays: Any) -> Tally:
    moments, pixels = (Moments(*(arrays[f"{name}_{k}"] for k in Moments._fields)) for name in ("moments", "pixels"))
    reservoir = Reservoir(*(arrays[f"reservoir_{k}"] for k in Reservoir._fields))
    moments, pixels = (one._replace(count=int(one.count)) for one in (moments, pixels))
    reservoir = reservoir._replace(capacity=int(reservoir.capacity))
    sums = {k: float(v) for k, v in zip(SUMS, arrays["sums"], strict=True)}
    return Tally(moments, reservoir, sums, int(arrays["done"]), pixels)


def save(path: Path, tally: Tally, key: str) -> None:
    """Writes a tally so that a file under `path` is always whole; `key` says what it is of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    arrays: Any = _to_arrays(tally)
    with partial.open("wb") as file:
        np.savez(file, key=np.array(key), **arrays)
    partial.replace(path)


def load(path: Path, key: str) -> Tally | None:
    """What `save` wrote for the same `key`; None where there is nothing of it, or it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return _from_arrays(arrays) if str(arrays["key"]) == key else None
    except (OSError, ValueError, KeyError, BadZipFile):
        return None
