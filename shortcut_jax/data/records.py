"""What a run reads: its settings, where the sets lie, and images as latents and back."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_jax.core.local_path import local_path
from shortcut_jax.core.setting import AT_LEAST_ONE, FREE, NOT_NEGATIVE, PROBABILITY, setting
from shortcut_jax.data.arrays import first_line
from shortcut_jax.data.datasets import EMBEDDED, register
from shortcut_jax.data.format import INFO, PreparedSet, Size
from shortcut_jax.data.stored import open_records
from shortcut_jax.data.text_file import read_lines
from shortcut_jax.errors import DataError

EncodeText = Callable[[str], tuple[np.ndarray, np.ndarray]]
"""caption -> txt [M, T], vec [V]."""


@dataclass(frozen=True)
class DataSettings:
    """The sets of a run and how their samples become rows.

    Attributes:
      name: a set: a folder that `shortcut_jax.prepare` wrote, the TFDS name of one with `image` and `caption`, or, of
        captions alone, a text file with one a line.
      mix: further sets, read beside it.
      weights: how often a sample comes from each of them, `name` first; empty means by their numbers of records.
      dir: the folder that holds the sets; a name may also be a path of its own.
      split: the split that is trained on.
      store: `pixels` (images are the latents themselves), `latents` (of an autoencoder, prepared beforehand), or
        `captions` (of any set, whose images are not looked at).
      height: rows of an image in pixels; of the sample grids, where a set has buckets of several sizes.
      width: columns of it in pixels.
      stride: pixels a latent, along each side: of the autoencoder (8 by default, as FLUX.1's), or of the blocks that
        are folded into channels in a set of pixels (1).
      text_encoder: `words`, or `stored` for states prepared with the set.
      text_tokens: M; longer captions are cut.
      text_states: `full` or `trimmed` (see `data.format.TextInfo`), of stored states.
      caption_dropout: probability of replacing a caption by the empty one.
      flip: probability of mirroring an image left to right, of a set of pixels.
      limit: records of a split that are trained on, from its beginning; 0 means all.
      threads: threads that read batches.
      workers: processes that read batches; 0 means this one.
    """

    name: str = "digits"
    mix: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    dir: str = setting("~/tensorflow_datasets", resume=FREE)
    split: str = "train"
    store: str = "pixels"
    height: int = 8
    width: int = 8
    stride: int | None = None
    text_encoder: str = "words"
    text_tokens: int = setting(8, AT_LEAST_ONE)
    text_states: str = "full"
    caption_dropout: float = setting(0.1, PROBABILITY)
    flip: float = setting(0.0, PROBABILITY)
    limit: int = setting(0, NOT_NEGATIVE)
    threads: int = setting(2, AT_LEAST_ONE, resume=FREE)
    workers: int = setting(0, NOT_NEGATIVE, resume=FREE)


STORES = ("pixels", "latents", "captions")


def stride_of(settings: DataSettings) -> int:
    """Pixels a latent, along each side; by default those of FLUX.1's autoencoder, or 1 where none is needed."""
    of_pixels = settings.store == "pixels" or (settings.store == "captions" and settings.text_encoder == "words")
    return settings.stride or (1 if of_pixels else 8)


def latent_size(settings: DataSettings, size: Size | None = None) -> tuple[int, int]:
    """Rows and columns of the latents of an image; of `height` x `width` by default."""
    height, width = size or (settings.height, settings.width)
    return height // stride_of(settings), width // stride_of(settings)


def data_folder(settings: DataSettings, name: str | None = None) -> Path:
    """Where a set lies, or would lie; the first one by default."""
    return local_path(settings.dir, "data.dir") / os.path.expanduser(name or settings.name)


def is_prepared(folder: Path) -> bool:
    """Whether a folder is a complete set that `shortcut_jax.prepare` wrote."""
    return (folder / INFO).is_file()


def is_text(settings: DataSettings, name: str | None = None) -> bool:
    """Whether a set is a text file with a caption a line."""
    return settings.store == "captions" and data_folder(settings, name).is_file()


def with_images(settings: DataSettings) -> DataSettings | None:
    """The settings of the same set with its images; None where there are captions alone.

    Raises:
      DataError: the set is unreadable.
    """
    if settings.store != "captions":
        return settings
    folder = data_folder(settings)
    if is_text(settings):
        return None
    store = PreparedSet(folder).info.store if is_prepared(folder) else "pixels"
    return None if store == "captions" else replace(settings, store=store)


def check_available(settings: DataSettings) -> None:
    """Says at once what is missing, before anything long starts.

    Raises:
      DataError: a set is neither embedded nor present, or has no such split.
    """
    for name in (settings.name, *settings.mix):
        check_present(settings, name)
        folder = data_folder(settings, name)
        if is_prepared(folder):
            PreparedSet(folder).check_split(settings.split)
        elif folder.exists() and not is_text(settings, name):
            _open_builder(settings, name)


def check_present(settings: DataSettings, name: str) -> None:
    """Raises DataError where a set is neither embedded nor present; nothing of it is opened."""
    folder = data_folder(settings, name)
    if is_prepared(folder) or (settings.store != "latents" and (name in EMBEDDED or folder.exists())):
        return
    unfinished = folder.with_name(f".{folder.name}.partial").exists()
    raise DataError(
        f"the data set {name!r} is not prepared: {folder} "
        + ("is not finished: rerun the same prepare command to resume. " if unfinished else "is not found. ")
        + (
            "Write a text file with a caption a line, or prepare a set (of --store=captions, or of images); "
            if settings.store == "captions"
            else f"Make it with python -m shortcut_jax.prepare --store={settings.store} --source=... --out={folder}; "
        )
        + "configs/digits.py runs without any prepared data, and --dry_run needs none"
    )


def read_captions(settings: DataSettings, name: str) -> list[dict[str, Any]]:
    """The records of a text file with a caption a line.

    Raises:
      DataError: it cannot be read, or has no caption.
    """
    path = data_folder(settings, name)
    return [{"caption": line.encode()} for line in read_lines(path, f"the captions {path}", "caption")]


def open_source(settings: DataSettings, name: str | None = None) -> Sequence[dict[str, Any]]:
    """The records of a TFDS set in storage order, each with at least `image` [h, w, c] uint8 and `caption` bytes.

    An embedded set is generated first, if absent. A small set is decoded once and kept in memory.

    Raises:
      DataError: the set is absent.
    """
    name = name or settings.name
    check_present(settings, name)
    builder = _open_builder(settings, name)
    source = open_records(builder, settings.split)
    if not len(source):
        raise DataError(f"the split {settings.split!r} of the data set {name!r} in {settings.dir} has no records")
    return in_memory(source, int(np.prod(source[0]["image"].shape)))


def _open_builder(settings: DataSettings, name: str) -> Any:
    """The builder of a TFDS set that has images, captions and the split; an embedded one is generated."""
    import tensorflow_datasets as tfds

    tfds.display_progress_bar(False)
    folder = os.path.expanduser(settings.dir)
    try:
        if name in EMBEDDED:
            register(name)
        builder = tfds.builder(name, data_dir=folder, file_format="array_record")
        if name in EMBEDDED:
            builder.download_and_prepare()
        held, fields = builder.info.splits, set(builder.info.features)
    except Exception as error:
        raise DataError(f"cannot open the data set {name!r} in {folder}: {first_line(error)}") from error
    if missing := {"image", "caption"} - fields:
        raise DataError(
            f"the data set {name!r} in {folder} has no {' and '.join(sorted(missing))}, only "
            f"{', '.join(sorted(fields))}: make a set of it with "
            f"python -m shortcut_jax.prepare --source=tfds:{name} --tfds_dir={folder} --out=..."
        )
    try:
        held[settings.split]  # which may also be a part of one, or a sum
    except (KeyError, ValueError) as error:
        told = ", ".join(f"{split} ({part.num_examples:,} records)" for split, part in held.items()) or "none"
        raise DataError(f"the data set {name!r} in {folder} has no split {settings.split!r}: it has {told}") from error
    return builder


def in_memory(records: Sequence[dict[str, Any]], num_bytes: int) -> Sequence[dict[str, Any]]:
    """Decodes a small set of images of `num_bytes` each once and for all; a large one is left as it is."""
    return [records[i] for i in range(len(records))] if len(records) * num_bytes < 2**28 else records


def to_latents(image: Any) -> Any:
    """8-bit pixels as latents in [-1, 1], float32: an array of numpy, or of JAX inside a step."""
    return image.astype(np.float32) / 127.5 - 1.0


def to_pixels(latents: np.ndarray) -> np.ndarray:
    """The inverse of `to_latents`, clipped and rounded to uint8."""
    return np.clip(np.round((np.asarray(latents, np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def fold(x_hwc: np.ndarray, block: int) -> np.ndarray:
    """Blocks of `block` x `block` pixels as channels: [h, w, c] -> [h / block, w / block, c block^2]."""
    h, w, c = x_hwc.shape
    blocks = x_hwc.reshape(h // block, block, w // block, block, c)
    return blocks.transpose(0, 2, 4, 1, 3).reshape(h // block, w // block, c * block**2)


def unfold(x_BhwC: np.ndarray, block: int) -> np.ndarray:
    """The inverse of `fold`, of a batch."""
    b, h, w, c = x_BhwC.shape
    blocks = x_BhwC.reshape(b, h, w, c // block**2, block, block)
    return blocks.transpose(0, 1, 4, 2, 5, 3).reshape(b, h * block, w * block, c // block**2)
