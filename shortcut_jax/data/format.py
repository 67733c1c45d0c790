"""Prepared sets: what `shortcut_jax.prepare` writes and training reads.

A set is a folder that TFDS opens (`tfds.builder_from_directory`): ArrayRecord shards without compression, read as fast
as the disk gives them, beside `dataset_info.json` and `features.json`. Four files are ours: `set.json` says what the
set is, `index.npz` which bucket each record is in, `prompts.safetensors` holds the text states of the empty caption and
of the prompts that images are drawn for, and `skipped.jsonl` tells what was left out. A folder with a `set.json` is
complete: it gets its name only when everything is in it.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from shortcut_jax.core.json_text import to_json
from shortcut_jax.data.arrays import first_line, read_arrays, read_headers
from shortcut_jax.data.check_info import check_info
from shortcut_jax.errors import DataError

FORMAT_VERSION = 1
INFO, INDEX, PROMPTS, SKIPPED = "set.json", "index.npz", "prompts.safetensors", "skipped.jsonl"
VAE = "vae"
"""Folder of the autoencoder of a set of latents, as diffusers writes it: images are drawn with nothing else."""

TEXT_DTYPES: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float8": ml_dtypes.float8_e4m3fn}
SPLITS = ("train", "validation")

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class TextInfo:
    """The text states of a set.

    Attributes:
      states: `full` (T5 states of all tokens, padding included, as FLUX.1 attends to them) or `trimmed` (of the tokens
        of the caption only, zeros behind them).
      dtype: of the stored T5 states, a key of `TEXT_DTYPES`.
      tokens: M, the length that captions are padded and cut to.
      width: T, of a T5 state, an even number.
      pooled_width: V, of CLIP's vector.
      error: norm of the rounding error over that of the states, of the records that it was measured on.
      cut: captions that were longer than `tokens`; None where that was not counted.
    """

    states: str
    dtype: str
    tokens: int
    width: int
    pooled_width: int
    error: float = 0.0
    cut: int | None = None


@dataclass(frozen=True)
class LatentInfo:
    """The latents of a set: z as the network sees it is (mean + std * noise - shift) * scale.

    Attributes:
      channels: of a latent.
      stride: pixels a latent, along each side.
      scale: see above.
      shift: see above.
    """

    channels: int
    stride: int
    scale: float
    shift: float


@dataclass(frozen=True)
class SetInfo:
    """What a set is (`set.json`).

    Attributes:
      store: `pixels`, `latents`, or `captions` without images.
      buckets: the sizes of its images; a record is of exactly one of them. Of captions alone (1, 1).
      counts: split -> records in each bucket.
      request: the arguments that it was made with, as they are compared when it is made again.
      skipped: reason -> records left out.
      enlarged: images that were smaller than their bucket.
      unused: what else the source had, of which nothing was made -> how many.
      text: of a set with text states.
      latents: of a set of latents, or those that are sampled for the captions of one.
      encoders: model -> what it was made with: `origin` in words and `content`, a hash.
      eval_prompts: captions whose text states are stored (of a set without text states, the captions alone).
      format_version: of this layout.
    """

    store: str
    buckets: tuple[Size, ...]
    counts: dict[str, tuple[int, ...]]
    request: dict[str, Any]
    skipped: dict[str, int] = field(default_factory=dict)
    enlarged: int = 0
    unused: dict[str, int] = field(default_factory=dict)
    text: TextInfo | None = None
    latents: LatentInfo | None = None
    encoders: dict[str, dict[str, str]] = field(default_factory=dict)
    eval_prompts: tuple[str, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def encoders_content(self) -> dict[str, str]:
        """The content hash of each encoder."""
        return {kind: made["content"] for kind, made in self.encoders.items()}

    def num_records(self, split: str) -> int:
        """Records of a split in all buckets."""
        return sum(self.counts.get(split, ()))

    @property
    def total(self) -> int:
        """Records of all splits."""
        return sum(map(self.num_records, self.counts))


class Shard(NamedTuple):
    """One ArrayRecord file of a split.

    Attributes:
      path: its file.
      buckets: of each of its records, in their order.
      num_bytes: of the records.
    """

    path: Path
    buckets: np.ndarray
    num_bytes: int


def set_features(store: str, text: TextInfo | None = None, latents: LatentInfo | None = None) -> Any:
    """The fields of a record, as TFDS features.

    `key`, `caption`, and the `height` and `width` that the image had before it was resized; then `image` (an encoded
    image), or `mean` and `std` [h, w, c] float16 of the latents' Gaussian, `txt` [M, T] (trimmed: [length, T]),
    `txt_exponent` (what is stored is txt / 2^exponent) and `vec` [V] float32. Captions alone have nothing of an image.
    """
    from tensorflow_datasets import features as tf

    fields: dict[str, Any] = {"key": tf.Text(), "caption": tf.Text(), "height": np.int32, "width": np.int32}
    if store == "pixels":
        return tf.FeaturesDict(fields | {"image": tf.Image(shape=(None, None, 3), encoding_format="png")})
    if text is None or latents is None:
        raise ValueError(f"a set of {store} has text states and latents")
    length = text.tokens if text.states == "full" else None
    txt = tf.Tensor(shape=(length, text.width), dtype=TEXT_DTYPES[text.dtype], encoding="bytes")
    vec = tf.Tensor(shape=(text.pooled_width,), dtype=np.float32, encoding="bytes")
    states = {"txt": txt, "txt_exponent": np.int32, "vec": vec}
    if store == "captions":
        return tf.FeaturesDict({"key": tf.Text(), "caption": tf.Text(), **states})
    moments = lambda: tf.Tensor(shape=(None, None, latents.channels), dtype=np.float16, encoding="bytes")
    return tf.FeaturesDict(fields | {"mean": moments(), "std": moments(), **states})


def pack_text(txt_MT: np.ndarray, text: TextInfo, length: int) -> tuple[dict[str, Any], float, float]:
    """The fields `txt` and `txt_exponent` of a caption's T5 states.

    float8 (e4m3: 3 bits of mantissa, 2^-9 to 448) is scaled by a power of two for each caption, so that its largest
    value is just representable: a scaling that is undone exactly.

    Args:
      txt_MT: float32 states.
      text: how they are stored.
      length: tokens of the caption, its end token included.

    Returns:
      the fields, and the sums of squares of the rounding error and of the states.
    """
    exponent = 0
    dtype = TEXT_DTYPES[text.dtype]
    kept_MT = np.asarray(txt_MT, np.float32)[: length if text.states == "trimmed" else None]
    largest = float(np.abs(kept_MT).max(initial=0.0))
    if text.dtype == "float8" and largest > 0:
        exponent = int(np.ceil(np.log2(largest / 448.0)))
    stored_MT = (kept_MT * np.float32(2.0**-exponent)).astype(dtype)
    error_MT = stored_MT.astype(np.float32) * np.float32(2.0**exponent) - kept_MT
    return {"txt": stored_MT, "txt_exponent": exponent}, float(np.sum(error_MT**2)), float(np.sum(kept_MT**2))


def unpack_text(record: Mapping[str, Any], text: TextInfo) -> np.ndarray:
    """T5 states [M, T] of a record, bfloat16, zeros behind those of a trimmed caption."""
    txt_MT = record["txt"]
    if text.dtype == "float8":
        pairs = np.ascontiguousarray(txt_MT).reshape(-1).view(np.uint16)
        txt_MT = _float8_pairs(int(record["txt_exponent"])).take(pairs).view(ml_dtypes.bfloat16).reshape(txt_MT.shape)
    if len(txt_MT) == text.tokens:
        return txt_MT
    padded_MT = np.zeros((text.tokens, text.width), ml_dtypes.bfloat16)
    padded_MT[: len(txt_MT)] = txt_MT
    return padded_MT


@functools.lru_cache(maxsize=32)
def _float8_pairs(exponent: int) -> np.ndarray:
    """Two float8 numbers side by side -> the bits of their bfloat16 values times 2^exponent.

    Looking up pairs is 17 times as fast as a cast of ml_dtypes (0.33 and 5.6 ms for 256 x 4,096, one core, 2026-11-24).
    """
    pairs = np.arange(65536, dtype=np.uint16).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return (pairs * np.float32(2.0**exponent)).astype(ml_dtypes.bfloat16).view(np.uint32)


def num_bytes(folder: Path) -> int:
    """What a set takes on the disk, all of its files together."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def dataset_name(folder: Path) -> str:
    """The TFDS name of a set: its folder's, in letters that TFDS allows."""
    name = re.sub(r"\W+", "_", folder.name.lower()).strip("_")
    return name if name[:1].isalpha() else f"set_{name}"


def shard_name(name: str, split: str, index: int, num: int) -> str:
    """The file of a shard, as TFDS calls it."""
    return f"{name}-{split}.array_record-{index:05d}-of-{num:05d}"


def write_set(
    folder: Path,
    name: str,
    info: SetInfo,
    shards: Mapping[str, Sequence[Shard]],
    prompts: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Completes a set whose shards lie in `folder` under their names: everything that is beside them, `set.json` last.

    Args:
      folder: of the set, under a name that nothing reads yet.
      name: `dataset_name` of the folder it will be.
      info: what it is.
      shards: of each split that has records, in the order of their names.
      prompts: `txt` [1 + P, M, T] bfloat16 and `vec` [1 + P, V] float32 of the empty caption and `info.eval_prompts`.
    """
    import tensorflow_datasets as tfds
    from etils import epath
    from tensorflow_datasets.core.naming import ShardedFileTemplate

    def split_info(split: str) -> Any:
        template = ShardedFileTemplate(
            data_dir=epath.Path(folder), dataset_name=name, split=split, filetype_suffix="array_record"
        )
        lengths, size = [len(s.buckets) for s in shards[split]], sum(s.num_bytes for s in shards[split])
        return tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)

    what = "Captions" if info.store == "captions" else f"Captioned images as {info.store}"
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=set_features(info.store, info.text, info.latents),
        split_infos=[split_info(split) for split in shards],
        check_data=False,
        description=f"{what}, prepared by shortcut_jax.",
    )
    if prompts is not None:
        save_file({k: np.ascontiguousarray(v) for k, v in prompts.items()}, folder / PROMPTS)
    index: dict[str, Any] = {
        split: np.concatenate([s.buckets for s in parts]).astype(np.uint16) for split, parts in shards.items()
    }
    np.savez(folder / INDEX, **index)
    (folder / INFO).write_text(to_json(dataclasses.asdict(info), indent=2) + "\n")


class PreparedSet:
    """A complete set, opened.

    Attributes:
      folder: where it lies.
      info: what it is.
    """

    def __init__(self, folder: str | Path):
        """Reads `set.json`; records are read when they are asked for.

        Raises:
          DataError: there is no set, it is unreadable, or of a later format.
        """
        self.folder = Path(folder).expanduser()
        self.info = read_info(self.folder)

    def records(self, split: str, decode: bool = True) -> Sequence[dict[str, Any]]:
        """The records of a split, read by index; `decode=False` leaves images encoded.

        Raises:
          DataError: there is no such split, or its files are damaged or tell different things.
        """
        import tensorflow_datasets as tfds

        from shortcut_jax.data.stored import open_records

        decoders = None if decode or self.info.store != "pixels" else {"image": tfds.decode.SkipDecoding()}
        self.check_split(split)
        try:
            builder = tfds.builder_from_directory(self.folder)
            stored, held = set(builder.info.features), builder.info.splits[split].num_examples
        except Exception as error:
            raise DataError(f"cannot open the records of {self.folder}: {first_line(error)}") from error
        if missing := sorted(set(set_features(self.info.store, self.info.text, self.info.latents)) - stored):
            raise DataError(f"{self.folder / 'features.json'} has no {missing[0]}, but {INFO} is of a set that has it")
        if held != self.info.num_records(split):
            raise DataError(
                f"{self.folder / INFO} counts {self.info.num_records(split):,} records of {split!r}, but its shards "
                f"hold {held:,}: prepare the set again"
            )
        return open_records(builder, split, decoders)

    def buckets(self, split: str) -> np.ndarray:
        """The bucket of each record, an index into `info.buckets`. Raises DataError where the index is damaged."""
        self.check_split(split)
        path, counts = self.folder / INDEX, self.info.counts[split]
        try:
            header = read_headers(path).get(split)
            if header is None or header.shape != (sum(counts),) or header.dtype.kind != "u":
                raise ValueError(f"it lacks the buckets of {sum(counts):,} records of {split!r}")
            index = read_arrays(path, [split])[split]
            if np.bincount(index, minlength=len(counts)).tolist() != list(counts):
                raise ValueError(f"its buckets of {split!r} are not those that {INFO} counts")
        except ValueError as error:
            raise DataError(f"{path} is damaged ({error}): copy the set again, or prepare it again") from error
        return index

    def prompts(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Caption -> txt [M, T] bfloat16 and vec [V] float32, of the empty caption and the prompts of the set.

        Raises:
          DataError: their file is missing or damaged.
        """
        path, text, num = self.folder / PROMPTS, self.info.text, 1 + len(self.info.eval_prompts)
        try:
            stored = load_file(path)
            shapes = {name: array.shape for name, array in stored.items()}
            if text and shapes != {"txt": (num, text.tokens, text.width), "vec": (num, text.pooled_width)}:
                raise ValueError(f"it lacks the states of {num} captions: {shapes}")
        except Exception as error:  # safetensors has errors of its own
            raise DataError(
                f"{path} is damaged ({first_line(error)}): copy the set again, or prepare it again"
            ) from error
        return dict(zip(("", *self.info.eval_prompts), zip(stored["txt"], stored["vec"], strict=True), strict=True))

    def check_split(self, split: str) -> None:
        """Raises DataError where the set has no record of a split."""
        if not self.info.num_records(split):
            held = ", ".join(f"{n} ({self.info.num_records(n):,} records)" for n in self.info.counts)
            raise DataError(f"{self.folder} has no split {split!r}: it has {held}")


def read_info(folder: Path) -> SetInfo:
    """What the set in a folder is.

    Raises:
      DataError: there is none, it is unreadable, or of a later format.
    """
    path = folder / INFO
    if not path.is_file():
        raise DataError(
            f"{folder} is no prepared set, for it has no {INFO}: make one with python -m shortcut_jax.prepare"
        )
    try:
        stored = json.loads(path.read_text())
        version = stored.get("format_version") if isinstance(stored, dict) else None
        if isinstance(version, int) and version != FORMAT_VERSION:
            raise DataError(f"{path} has format version {version}, not {FORMAT_VERSION}")
        check_info(stored)
        return SetInfo(
            **{
                **stored,
                "buckets": tuple(tuple(size) for size in stored["buckets"]),
                "counts": {split: tuple(numbers) for split, numbers in stored["counts"].items()},
                "text": stored["text"] and TextInfo(**stored["text"]),
                "latents": stored["latents"] and LatentInfo(**stored["latents"]),
                "eval_prompts": tuple(stored["eval_prompts"]),
            }
        )
    except DataError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise DataError(f"{path} cannot be read: {reason}") from error
