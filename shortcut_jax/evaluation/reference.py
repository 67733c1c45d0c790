"""The real images that samples are judged against: statistics of their features, made once and kept."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from shortcut_jax.cluster import distributed, key_value
from shortcut_jax.core.stats import Gaussian, gaussian_of
from shortcut_jax.data.arrays import Header, read_arrays, read_headers
from shortcut_jax.data.images import ENDINGS, BadImage, decode, read_image
from shortcut_jax.errors import ConfigError
from shortcut_jax.evaluation.accumulators import RESERVOIR, Tally, add, no_tally, of_all_processes
from shortcut_jax.evaluation.captions import CaptionedSet
from shortcut_jax.evaluation.features import Features
from shortcut_jax.preparation.inputs.unused import is_system_file
from shortcut_jax.preparation.progress import skipped_text
from shortcut_jax.preparation.units import stamp

HOW = "make them with python -m shortcut_jax.evaluate --save_reference=FILE.npz --reference=FOLDER_OF_PICTURES"
BATCH = 256
KNOWN = ("mu", "sigma", "features", "label", "source", "count")
"""Arrays of statistics; others in a file are not read."""
MAX_TEXT = 40_000
"""Bytes of a name in a file."""
ROUNDING = 1e-3
"""Of covariances that tools keep in float32, relative to the largest value."""
MAX_BAD = 0.05
"""Share of a folder's images that may be left out because they cannot be used, and at least one."""


class Reference(NamedTuple):
    """Statistics of real images.

    Attributes:
      gaussian: of their features.
      features: of a sample of them, [S, F], S at most `tally.RESERVOIR`; None where the file has the Gaussian only.
      source: where they come from.
      num_images: 0 where that is not known.
      pixels: of the images themselves, where they are looked at too.
    """

    gaussian: Gaussian
    features: np.ndarray | None
    source: str
    num_images: int
    pixels: Gaussian | None = None


def open_reference(given: str | None, own: CaptionedSet | None, features: Features, cache: Path) -> Reference:
    """The reference of an evaluation.

    Args:
      given: statistics (`.npz` with mu and sigma), or a folder of images; None for the subject's training set.
      own: that set.
      features: of images.
      cache: folder where statistics that are computed here are kept.

    Raises:
      ConfigError: there are none, or they are of other features; the message says how to make some.
    """
    if given is None:
        if own is None:
            raise ConfigError(f"reference statistics are missing: give --reference=FILE.npz, or {HOW}")
        named = lambda: "the training set"
        return _kept(cache, own.identity, features, lambda: _images_of_set(own), len(own), named)
    path = Path(given).expanduser()
    if path.is_dir():
        files = _image_files(path)
        if len(files) < 2:
            raise ConfigError(f"--reference={given} has {len(files)} images ({', '.join(ENDINGS)}): give at least 2")
        stated = "".join(f"{os.fsdecode(file)} {stamp(file)}\n" for file in files)
        identity = hashlib.sha256(stated.encode("utf-8", "backslashreplace")).hexdigest()
        bad: Counter[str] = Counter()
        images = lambda: _images_of_files(given, files, bad)
        named = lambda: f"images of {given}" + (f" ({skipped_text(bad)} left out)" if bad else "")
        return _kept(cache, f"{path.resolve()} {identity}", features, images, len(files), named)
    if not path.is_file():
        raise ConfigError(f"reference statistics {given} are not found: {HOW}")
    return load_reference(path, features)


def load_reference(path: Path, features: Features) -> Reference:
    """Statistics as the tools for FID write them: `mu` [F] and `sigma` [F, F]; those of `save_reference` have more.

    Raises:
      ConfigError: it is no such file, or of other features.
    """
    try:
        held = read_headers(path)
        _check_headers(held, features.size)
        arrays = read_arrays(path, [name for name in KNOWN if name in held])
        _check_values(arrays)
    except ValueError as error:
        raise ConfigError(f"reference statistics {path} cannot be used ({error}): {HOW}") from None
    name = str(arrays.get("label", features.name))
    if name != features.name:
        raise ConfigError(f"{path} is for {name}, but {features.name} is asked for: {HOW}")
    gaussian = Gaussian(arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64))
    source, count = str(arrays.get("source", path.name)), int(arrays.get("count", 0))
    return Reference(gaussian, arrays.get("features"), source, count)


def _check_headers(held: Mapping[str, Header], size: int) -> None:
    """Raises ValueError where arrays have not the shapes of statistics of `size` features; none of them is read yet."""
    if "mu" not in held or "sigma" not in held:
        raise ValueError(f"it has no mu and sigma, but {', '.join(held) or 'nothing'}"[:200])
    shape = held["mu"].shape
    if len(shape) == 1 and shape != (size,):
        raise ValueError(f"it has statistics of {shape[0]} features, but {size} are asked for")
    rows = held["features"].shape[:1] if "features" in held else ()
    for name, shape, kinds in (
        ("mu", (size,), "fiu"),
        ("sigma", (size, size), "fiu"),
        ("features", (*rows, size), "f"),
        ("label", (), "U"),
        ("source", (), "U"),
        ("count", (), "iu"),
    ):
        header = held.get(name, Header(shape, np.dtype(kinds[0])))
        if header.shape != shape or header.dtype.kind not in kinds:
            raise ValueError(f"its {name} has the shape {header.shape} and the type {header.dtype}, not {shape}")
        if kinds == "U" and header.dtype.itemsize > MAX_TEXT:
            raise ValueError(f"its {name} is a text of {header.dtype.itemsize:,} bytes")
    if rows and rows[0] > RESERVOIR:
        raise ValueError(f"its features are {rows[0]:,}, but at most {RESERVOIR:,} are kept")


def _check_values(arrays: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError where numbers are not finite, or sigma is not the covariance of anything."""
    for name in ("mu", "sigma", "features"):
        if name in arrays and not np.isfinite(arrays[name]).all():
            raise ValueError(f"its {name} has values that are not finite")
    sigma = arrays["sigma"].astype(np.float64)
    largest = np.abs(sigma).max(initial=0.0)
    if np.abs(sigma - sigma.T).max(initial=0.0) > ROUNDING * largest:
        raise ValueError("its sigma is not symmetric, so not a covariance")
    if np.linalg.eigvalsh(sigma).min(initial=0.0) < -ROUNDING * largest * np.sqrt(len(sigma)):
        raise ValueError("its sigma has negative eigenvalues, so is not a covariance")


def save_reference(path: Path, reference: Reference, features: Features) -> None:
    """Writes statistics that also other tools for FID read."""
    mean, covariance = reference.gaussian
    more: Any = {} if reference.features is None else {"features": reference.features}
    more |= {"label": features.name, "source": reference.source, "count": reference.num_images}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, mu=mean, sigma=covariance, **more)
    partial.replace(path)


def _kept(
    cache: Path,
    identity: str,
    features: Features,
    images: Callable[[], Iterable[np.ndarray]],
    total: int,
    source: Callable[[], str],
) -> Reference:
    """Statistics of `total` images known by `identity`, from a file in `cache`, which is made where it is absent.

    `source` is asked when all images have been seen.
    """
    name = hashlib.sha256(f"{features.identity} {identity}".encode()).hexdigest()[:12]
    path = cache / f"reference-{name}.npz"
    if not distributed.agree(path.is_file()):
        tally = of_all_processes(_tally(images(), features, total))
        reference = Reference(gaussian_of(tally.moments), tally.reservoir.features_SF, source(), tally.done)
        if key_value.process_id() == 0:
            save_reference(path, reference, features)
        return reference
    return load_reference(path, features)


def _tally(batches: Iterable[np.ndarray], features: Features, total: int) -> Tally:
    """Of this process's share of the images."""
    tally, done = no_tally(features.size), 0
    rank, processes = key_value.process_id(), key_value.num_processes()
    with tqdm(total=total, desc="reference", unit="image", disable=rank > 0, leave=False) as bar:
        for images in batches:
            mine = np.arange(rank, len(images), processes)
            indices, done = done + mine, done + len(images)
            tally = add(tally, indices, features(images[mine]), {}, done) if len(mine) else tally._replace(done=done)
            bar.update(len(images))
    return tally


def _images_of_set(own: CaptionedSet) -> Iterator[np.ndarray]:
    for first in range(0, len(own), BATCH):
        yield own.images(range(first, min(first + BATCH, len(own))))


def _image_files(folder: Path) -> list[Path]:
    """The image files in a folder and below, sorted."""
    endings = tuple(f".{ending}" for ending in ENDINGS)
    found = (p for p in folder.rglob("*") if p.name.lower().endswith(endings) and not p.is_dir())
    return sorted(p for p in found if not is_system_file(p.relative_to(folder).as_posix()))


def _images_of_files(given: str, files: list[Path], bad: Counter[str]) -> Iterator[np.ndarray]:
    """Images in their order, those of one size together as long as they follow each other.

    Args:
      given: their folder, as errors call it.
      files: of the images.
      bad: reason -> images that cannot be used, counted here.

    Raises:
      ConfigError: more than `MAX_BAD` of them cannot be used, or all but one.
    """
    waiting: list[np.ndarray] = []
    for path in files:
        try:
            pixels = np.asarray(decode(read_image(path)).convert("RGB"))
        except BadImage as error:
            bad[error.reason] += 1
            if bad.total() > min(max(1, MAX_BAD * len(files)), len(files) - 2):
                raise ConfigError(
                    f"--reference={given}: of {len(files):,} images more than {MAX_BAD:.0%} cannot be used "
                    f"({skipped_text(bad)} so far, the last one {path}: {error}): correct them or take them out"
                ) from None
            continue
        if waiting and (waiting[0].shape != pixels.shape or len(waiting) == BATCH):
            yield np.stack(waiting)
            waiting = []
        waiting.append(pixels)
    yield np.stack(waiting)
