"""Opening data sets: TFDS sets stored as ArrayRecord, read without TensorFlow."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_jax.data.format import DataError

EMBEDDED = ("digits",)
"""Sets that are generated on first use from what the installation ships."""


@dataclass(frozen=True)
class DataSettings:
    """A data set and how its samples become rows.

    Attributes:
      name: the TFDS name.
      dir: the folder that holds TFDS sets.
      split: TFDS split.
      store: `pixels` (images are the latents themselves) or `latents` (of an autoencoder, prepared beforehand).
      height: rows of an image in pixels.
      width: columns of an image in pixels.
      text_encoder: `words`, or `stored` for states prepared with the set.
      text_tokens: M; longer captions are cut.
      caption_dropout: probability of replacing a caption by the empty one.
      limit: records of the split that are trained on, from its beginning; 0 means all.
    """

    name: str = "digits"
    dir: str = "~/tensorflow_datasets"
    split: str = "train"
    store: str = "pixels"
    height: int = 8
    width: int = 8
    text_encoder: str = "words"
    text_tokens: int = 8
    caption_dropout: float = 0.1
    limit: int = 0


LATENT_STRIDE = 8
"""Pixels a latent, along each side, in Flux's autoencoder."""


def latent_size(settings: DataSettings) -> tuple[int, int]:
    """Rows and columns of the latents."""
    stride = LATENT_STRIDE if settings.store == "latents" else 1
    return settings.height // stride, settings.width // stride


def data_folder(settings: DataSettings) -> Path:
    """Where the set lies, or would lie."""
    return Path(os.path.expanduser(settings.dir)) / settings.name


def check_available(settings: DataSettings) -> None:
    """Says at once what is missing, before anything long starts.

    Raises:
      DataError: the set is neither embedded nor present, or is of a kind that cannot be read yet.
    """
    folder = data_folder(settings)
    if settings.store == "latents":
        state = "is not there" if not folder.exists() else "cannot be read yet"
        raise DataError(
            f"the data set {settings.name!r} of prepared latents {state}: {folder}. It will be written from captioned "
            f"images by `python -m shortcut_jax.prepare`, which this version does not have. "
            f"configs/digits.py runs without any prepared data; --dry_run needs none either"
        )
    if settings.name not in EMBEDDED and not folder.exists():
        raise DataError(f"the data set {settings.name!r} is not prepared: {folder} is not there")


def open_source(settings: DataSettings) -> Sequence[dict[str, Any]]:
    """The records in storage order, each with at least `image` [h, w, c] uint8 and `caption` bytes.

    An embedded set is generated first, if absent. A small set is decoded once and kept in memory.

    Raises:
      DataError: the set is absent.
    """
    check_available(settings)
    import tensorflow_datasets as tfds

    tfds.display_progress_bar(False)
    import shortcut_jax.data.datasets.digits  # noqa: F401  (registers the builder)

    folder = os.path.expanduser(settings.dir)
    try:
        builder = tfds.builder(settings.name, data_dir=folder, file_format="array_record")
        if settings.name in EMBEDDED:
            builder.download_and_prepare()
        source = builder.as_data_source(split=settings.split)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"cannot open the data set {settings.name!r} in {folder}: {reason}") from error
    small = len(source) * int(np.prod(source[0]["image"].shape)) < 2**28
    return [source[i] for i in range(len(source))] if small else source


def to_latents(image: np.ndarray) -> np.ndarray:
    """8-bit pixels as latents in [-1, 1], float32."""
    return image.astype(np.float32) / 127.5 - 1.0


def to_pixels(latents: np.ndarray) -> np.ndarray:
    """The inverse of `to_latents`, clipped and rounded to uint8."""
    return np.clip(np.round((np.asarray(latents, np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)
