"""Folders of images without a table: with captions in files beside them, or with classes as the names of folders."""

import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from shortcut_jax.errors import DataError
from shortcut_jax.preparation.inputs.items import (
    CAPTION_FIELDS,
    Item,
    SourceOptions,
    caption_in,
    captioned,
    consecutive,
    hash_of,
    printable,
)
from shortcut_jax.preparation.inputs.tables import parse_json
from shortcut_jax.preparation.inputs.template import fields_of, fill
from shortcut_jax.preparation.inputs.tree import Tree, is_image
from shortcut_jax.preparation.units import Skip, Unit, stamp

CAPTIONS = (".txt", ".caption", ".json")
"""Endings of files that hold the caption of the image of the same name, the first of them that exists."""
MAX_SIDECAR = 2**24
"""Bytes; a larger file is no caption."""
LISTED = 3


class Pair(NamedTuple):
    """An image and the file of its caption, one of which may be missing."""

    image: str | None
    caption: str | None


class SidecarSource:
    """Images with a text file of the same name beside each, in folders at any depth.

    Attributes:
      units: consecutive images, with the captions that have no image.
      num_items: of both.
      fingerprint: of all names, and of size and time of the captions.
      notes: what was found.
      unused: see `Source`.
    """

    def __init__(self, tree: Tree, options: SourceOptions):
        """Pairs images and captions.

        Raises:
          DataError: a link leads out of the folder, or `caption_field` is given and no caption has fields.
        """
        self._folder, self._field, self._unit = tree.folder, options.caption_field, options.unit
        endings = (".json",) if self._field else CAPTIONS
        bookkeeping = img2dataset_files(tree)
        self._pairs = pairs_of([name for name in tree.files if name not in bookkeeping], endings)
        used = {name for pair in self._pairs for name in pair if name}
        if self._field and not any(pair.image and pair.caption for pair in self._pairs):
            raise DataError(f"--caption_field={self._field}: no image in {tree.folder} has a .json beside it")
        tree.check_links(used)
        self.num_items = len(self._pairs)
        lines = [self._stated(pair) for pair in self._pairs]
        self.units = consecutive(self.num_items, options.unit, "images", lambda a, b: hash_of(lines[a:b]))
        self.fingerprint = hash_of(["sidecars", *lines])
        found = Counter(os.path.splitext(p.caption)[1].lower() for p in self._pairs if p.image and p.caption)
        told = ", ".join(f"{found[ending]:,} of {ending}" for ending in CAPTIONS if found[ending])
        rest = tree.rest(used | bookkeeping)
        self.notes, self.unused = (f"captions: {told}", *_repeats(tree), *rest.notes), rest.counts

    def _stated(self, pair: Pair) -> str:
        return f"{pair.image} {pair.caption} {stamp(self._folder / pair.caption) if pair.caption else ''}"

    def items(self, unit: Unit) -> Iterator[Item | Skip]:
        """The images of a unit."""
        start = unit.index * self._unit
        for image, caption in self._pairs[start : start + (unit.size or 0)]:
            if image is None:
                yield Skip(printable(caption or ""), "missing image", "no image of this name lies beside it")
            elif caption is None:
                wanted = ".json" if self._field else f"{', '.join(CAPTIONS[:-1])} or {CAPTIONS[-1]}"
                yield Skip(printable(image), "missing caption", f"no {wanted} of this name lies beside it")
            else:
                yield self._item(image, caption)

    def _item(self, image: str, caption: str) -> Item | Skip:
        key, path = printable(image), self._folder / caption
        try:
            if (size := path.stat().st_size) > MAX_SIDECAR:
                return Skip(key, "over-long caption", f"{caption} has {size:,} bytes")
            data = path.read_bytes()
        except OSError as error:
            return Skip(key, "missing caption", f"{caption}: {error.strerror}")
        if not caption.lower().endswith(".json"):
            return captioned(key, self._folder / image, data)
        row = parse_json(data)
        if isinstance(row, Skip):
            return row._replace(key=key)
        value = caption_in(row, self._field)
        if value is None:
            return Skip(key, "missing field", f"{caption} has no {self._field or ', '.join(CAPTION_FIELDS)}")
        return captioned(key, self._folder / image, value)


class ClassSource:
    """Images in folders whose names are their classes; captions are a template with `{label}`.

    Attributes:
      units: consecutive images.
      num_items: of them.
      fingerprint: of all names.
      notes: what was found.
      unused: see `Source`.
    """

    def __init__(self, tree: Tree, options: SourceOptions):
        """Takes the images.

        Raises:
          DataError: a link leads out of the folder, or the template cannot be filled in.
        """
        self._folder, self._unit, self._template = tree.folder, options.unit, options.template or ""
        self._images = tree.images()
        tree.check_links(self._images)
        fields_of(self._template, ["label"])
        self.num_items = len(self._images)
        state = lambda first, end: hash_of(self._images[first:end])
        self.units = consecutive(self.num_items, options.unit, "images", state)
        self.fingerprint = hash_of(["classes", *self._images])
        classes = sorted({_label(name) for name in self._images} - {""})
        listed = ", ".join(classes[:LISTED]) + (", ..." if len(classes) > LISTED else "")
        rest = tree.rest(self._images)
        self.notes, self.unused = (f"classes: {len(classes):,} ({listed})", *rest.notes), rest.counts

    def items(self, unit: Unit) -> Iterator[Item | Skip]:
        """The images of a unit."""
        start = unit.index * self._unit
        for name in self._images[start : start + (unit.size or 0)]:
            key, label = printable(name), _label(name)
            if label:
                yield captioned(key, self._folder / name, fill(self._template, {"label": label}))
            else:
                yield Skip(key, "missing caption", "it lies in no folder that would be its class")


def pairs_of(files: list[str], endings: tuple[str, ...]) -> list[Pair]:
    """Images and captions of the same name, in the order of the names; `endings` of captions, the first that exists."""
    captions: dict[str, dict[str, str]] = {}
    images: dict[str, list[str]] = {}
    for name in files:
        stem, ending = posixpath.splitext(name)
        if is_image(name):
            images.setdefault(stem, []).append(name)
        elif ending.lower() in endings:
            captions.setdefault(stem, {})[ending.lower()] = name
    result = []
    for stem in sorted({*images, *captions}):
        caption = next((captions[stem][e] for e in endings if stem in captions and e in captions[stem]), None)
        result += [Pair(image, caption) for image in images.get(stem, [None])]  # type: ignore[list-item]
    return result


def has_sidecars(tree: Tree) -> bool:
    """Whether an image has a caption beside it."""
    return any(pair.image and pair.caption for pair in pairs_of(tree.files, CAPTIONS))


def is_img2dataset(tree: Tree) -> bool:
    """Whether a folder is the output of img2dataset with `output_format=files`."""
    return bool(img2dataset_files(tree)) and has_sidecars(tree)


def img2dataset_files(tree: Tree) -> set[str]:
    """What img2dataset writes beside its shards: 00000_stats.json and 00000.parquet by 00000/ or 00000.tar."""
    stems = [match[1] for name in tree.files if (match := re.fullmatch(r"(\d+)_stats\.json", name))]
    shards = tree.tops() | {name.removesuffix(".tar") for name in tree.files if name.endswith(".tar")}
    return {f"{stem}{end}" for stem in stems if stem in shards for end in ("_stats.json", ".parquet")}


def _label(name: str) -> str:
    return posixpath.basename(posixpath.dirname(name)).replace("_", " ").strip()


def _repeats(tree: Tree) -> tuple[str, ...]:
    named = sorted(top for top in tree.tops() if re.match(r"\d+_\D", top))
    return (
        (f"each image is read once, also in {named[0]}: repeats in the names of folders are not used",) if named else ()
    )
