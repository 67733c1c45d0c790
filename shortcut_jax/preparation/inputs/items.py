"""What a source of captioned images is, and what is wrong with a caption."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from shortcut_jax.preparation.units import Skip, Unit, Unused

CAPTION_FIELDS = ("prompt", "caption", "text")
"""Names under which captions are looked for, in this order."""
MAX_CAPTION = 10_000
"""Characters; a longer text is no caption. (One that is only longer than the text encoder reads is cut there.)"""


class Item(NamedTuple):
    """A captioned image.

    Attributes:
      key: its name in the source.
      image: its encoded bytes, or the file that holds them.
      caption: without spaces around it.
      further: captions that it has besides, which are not used.
    """

    key: str
    image: bytes | Path
    caption: str
    further: int = 0


class Source(Protocol):
    """Captioned images in units, in an order that does not change.

    Attributes:
      units: all of them.
      num_items: images and what is left out, where that is known beforehand.
      fingerprint: changes when the source does.
      notes: what was found in it, a line each.
      unused: files and folders beside its items that nothing is made of: kind -> how many of it.
    """

    @property
    def units(self) -> Sequence[Unit]: ...  # noqa: D102

    @property
    def num_items(self) -> int | None: ...  # noqa: D102

    @property
    def fingerprint(self) -> str: ...  # noqa: D102

    @property
    def notes(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def unused(self) -> Mapping[str, int]: ...  # noqa: D102

    def items(self, unit: Unit) -> Iterator[Item | Skip | Unused]: ...  # noqa: D102


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read.

    Attributes:
      unit: images a unit, where the source does not divide itself.
      where: `field=value` that the rows of a table have to have.
      caption_field: of a row; `captions/text` goes into nested fields of a TFDS record.
      template: caption of a TFDS or parquet record with its fields in braces, or of an image in the folder `{label}`.
      tfds_dir: where TFDS sets lie.
      layout: name of the one that is read, where a folder has several.
    """

    unit: int = 4096
    where: tuple[str, ...] = ()
    caption_field: str | None = None
    template: str | None = None
    tfds_dir: str = "~/tensorflow_datasets"
    layout: str | None = None


def consecutive(num: int, size: int, what: str, state: Callable[[int, int], str] = lambda first, end: "") -> list[Unit]:
    """Units of `size` records in a row each; unit i begins with record i `size`.

    Args:
      num: records of all units.
      size: see above.
      what: the records are.
      state: first record and the one behind the last -> what changes when the source of these does.
    """
    spans = ((first, min(first + size, num)) for first in range(0, num, size))
    return [Unit(i, f"{what} {a} to {b - 1}", b - a, state(a, b)) for i, (a, b) in enumerate(spans)]


def hash_of(lines: Iterable[str]) -> str:
    """A hash of lines."""
    joined = "\n".join(lines)
    return hashlib.sha256(joined.encode("utf-8", "backslashreplace")).hexdigest()


def captioned(key: str, image: bytes | Path, caption: Any) -> Item | Skip:
    """An image with its caption (text, its bytes, or a list of which the first counts), or what is wrong with it."""
    further = 0
    if isinstance(caption, np.ndarray | np.generic):
        caption = caption.tolist()
    if isinstance(caption, list | tuple):
        further, caption = max(0, len(caption) - 1), caption[0] if caption else ""
    if isinstance(caption, bytes):
        try:
            caption = caption.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return Skip(key, "not UTF-8", str(error))
    if not isinstance(caption, str):
        return Skip(key, "missing field", f"the caption is {type(caption).__name__}, not text")
    caption = caption.strip()
    if not caption:
        return Skip(key, "empty caption")
    if len(caption) > MAX_CAPTION:
        return Skip(key, "over-long caption", f"{len(caption):,} characters")
    try:
        caption.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        return Skip(key, "not UTF-8", str(error))
    return Item(key, image, caption, further)


def caption_in(row: dict[str, Any], caption_field: str | None) -> Any:
    """The caption of a row, None where it has none."""
    names = (caption_field,) if caption_field else CAPTION_FIELDS
    return next((row[name] for name in names if row.get(name) is not None), None)


def printable(key: str) -> str:
    """A name that can be written as UTF-8."""
    return key.encode("utf-8", "backslashreplace").decode()
