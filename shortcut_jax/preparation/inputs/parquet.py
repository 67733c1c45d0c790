"""Parquet files as Hugging Face `datasets` writes them: a column of images, as bytes, and one of captions."""

import hashlib
import json
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from shortcut_jax.errors import DataError
from shortcut_jax.preparation.inputs.files import img2dataset_files
from shortcut_jax.preparation.inputs.items import CAPTION_FIELDS, Item, SourceOptions, caption_in, captioned, printable
from shortcut_jax.preparation.inputs.tables import parquet_errors
from shortcut_jax.preparation.inputs.template import fields_of, fill
from shortcut_jax.preparation.inputs.tree import Tree
from shortcut_jax.preparation.units import Skip, Unit, stamp

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
"""Names of a column of bytes that is one of images; a struct with `bytes` is one by any name."""
SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval")
TRAIN = ("train", "training")
AT_ONCE = 64
"""Rows that are held in memory."""


class Part(NamedTuple):
    """Some row groups of a file that lie next to each other."""

    path: Path
    groups: tuple[int, ...]
    first: int


class ParquetSource:
    """See the module.

    Attributes:
      units: row groups of a file, as many as make about `options.unit` rows.
      num_items: rows of all files.
      fingerprint: of the files' names, sizes, numbers of rows and columns.
      notes: what was found.
      unused: see `Source`.
    """

    def __init__(self, tree: Tree, options: SourceOptions):
        """Reads the schemas and the numbers of rows.

        Raises:
          DataError: they are not of one kind, or have no images or no captions.
        """
        names, others = split_files(tree)
        tree.check_links(names)
        self._template = options.template
        self._base, self._parts, self.units = tree.folder, list[Part](), list[Unit]()
        self.num_items, stated, schemas = 0, "", list[Any]()
        for name in names:
            path = tree.folder / name
            with parquet_errors(path) as parquet, parquet.ParquetFile(path) as file:
                schemas.append(file.schema_arrow)
                stated += f"{name} {path.stat().st_size} {file.metadata.num_rows} {file.schema_arrow.names}\n"
                self._divide(path, name, file.metadata, options.unit)
        if not self.num_items:
            raise DataError(f"the parquet files in {tree.folder} have no rows")
        self.fingerprint = hashlib.sha256(stated.encode("utf-8", "backslashreplace")).hexdigest()
        different = [n for n, schema in zip(names, schemas, strict=True) if schema.names != schemas[0].names]
        if different:
            raise DataError(f"{tree.folder}: {names[0]} and {different[0]} have other columns: give one kind of file")
        self._image = _image_column(tree.folder / names[0], schemas[0])
        self._labels = _class_names(schemas[0])
        self._field = options.caption_field
        self._columns = self._needed(tree.folder / names[0], schemas[0].names)
        told = f"{len(names):,} file{'s' * (len(names) > 1)}, {self.num_items:,} rows; images: {self._image}"
        rest = tree.rest({*data_files(tree), *img2dataset_files(tree)}, others)
        self.notes, self.unused = (told, *(_split_text(s, n) for s, n in others.items()), *rest.notes), rest.counts

    def _divide(self, path: Path, name: str, metadata: Any, unit: int) -> None:
        groups, rows, first = list[int](), 0, 0
        for group in range(metadata.num_row_groups):
            groups.append(group)
            rows += metadata.row_group(group).num_rows
            if rows >= unit or group == metadata.num_row_groups - 1:
                title = f"{printable(posixpath.splitext(name)[0])} rows {first} to {first + rows - 1}"
                read = stamp(path)
                self.units.append(Unit(len(self.units), title, rows, f"{read} {groups}", (str(path), read)))
                self._parts.append(Part(path, tuple(groups), first))
                groups, rows, first = [], 0, first + rows
        self.num_items += metadata.num_rows

    def _needed(self, path: Path, names: list[str]) -> list[str]:
        """The columns that are read."""
        told = f"the columns are {', '.join(names)}"
        if self._field and self._field not in names:
            raise DataError(f"--caption_field={self._field} is no column of {path}: {told}")
        if self._template:
            return [self._image, *sorted(fields_of(self._template, [n for n in names if n != self._image]))]
        captions = [self._field] if self._field else [name for name in CAPTION_FIELDS if name in names]
        if not captions:
            raise DataError(
                f"{path} has no column {', '.join(CAPTION_FIELDS)}: name the captions with --caption_field=COLUMN or "
                f'--template="a photo of a {{label}}"; {told}'
            )
        return list(dict.fromkeys([self._image, *captions]))

    def items(self, unit: Unit) -> Iterator[Item | Skip]:
        """The rows of a unit, read a few at a time."""
        part = self._parts[unit.index]
        stem = printable(posixpath.splitext(os.path.relpath(part.path, self._base))[0])
        with parquet_errors(part.path) as parquet, parquet.ParquetFile(part.path) as file:
            index = part.first
            for batch in file.iter_batches(AT_ONCE, row_groups=list(part.groups), columns=self._columns):
                for row in batch.to_pylist():
                    yield self._item(f"{stem}/{index:08d}", row)
                    index += 1

    def _item(self, key: str, row: dict[str, Any]) -> Item | Skip:
        image = row.pop(self._image)
        data = image.get("bytes") if isinstance(image, Mapping) else image
        if not data:
            path = image.get("path") if isinstance(image, Mapping) else None
            return Skip(key, "missing image", f"only its path is stored: {path}" if path else "no bytes are stored")
        if self._template:
            words = {name: self._word(name, value) for name, value in row.items()}
            unset = [name for name, word in words.items() if word is None]
            if unset:
                return Skip(key, "missing field", f"it has no {unset[0]}")
            return captioned(key, data, fill(self._template, words))
        caption = caption_in(row, self._field)
        if caption is None:
            return Skip(key, "missing field", f"it has no {self._field or ', '.join(CAPTION_FIELDS)}")
        return captioned(key, data, caption)

    def _word(self, column: str, value: Any) -> Any:
        """A value as a template shows it: of a class its name, None where it has none (which is stored as -1)."""
        if column not in self._labels or not isinstance(value, int):
            return value
        names = self._labels[column]
        return names[value].replace("_", " ") if 0 <= value < len(names) else None


def split_files(tree: Tree) -> tuple[list[str], dict[str, int]]:
    """The files that are read, those of `train` where their names have splits; and how many of other splits are not.

    Files whose names have no split are those of the split "".

    Raises:
      DataError: those of several data sets.
    """
    names = data_files(tree)
    splits = {name: split_of(name) for name in names}
    if any(split in TRAIN for split in splits.values()):
        chosen = [name for name in names if splits[name] in TRAIN]
    else:
        chosen = [name for name in names if splits[name] is None] or names
    left = [splits[name] or "" for name in names if name not in {*chosen}]
    kinds = sorted({posixpath.dirname(re.sub(rf"(^|/)({'|'.join(SPLITS)})/", r"\1", name)) for name in chosen})
    if len(kinds) > 1:
        raise DataError(
            f"--source={tree.folder} has parquet files of {len(kinds)} data sets: give one of the folders "
            f"{', '.join(kind or '.' for kind in kinds)}"
        )
    return chosen, {split: left.count(split) for split in sorted({*left})}


def _split_text(split: str, number: int) -> str:
    files = f"{number:,} file{'s' * (number > 1)}"
    return f"the split {split} is not read: {files}" if split else f"files of no split are not read: {files}"


def data_files(tree: Tree) -> list[str]:
    """The parquet files that hold images, not what else is written about them."""
    skipped = img2dataset_files(tree)
    return [n for n in tree.files if n.endswith(".parquet") and n not in skipped and n != "metadata.parquet"]


def split_of(name: str) -> str | None:
    """The split that a file's folder or the beginning of its name says: `data/train-00000-of-00002.parquet`."""
    *folders, base = name.split("/")
    found = [folder for folder in folders if folder in SPLITS]
    return found[0] if found else next((s for s in SPLITS if re.match(rf"{s}(?![A-Za-z])", base)), None)


def _image_column(path: Path, schema: Any) -> str:
    """The column of images."""
    import pyarrow

    def holds_images(field: Any) -> bool:
        kind = field.type
        if pyarrow.types.is_struct(kind):
            return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        return field.name in IMAGE_COLUMNS and (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))

    found = [field.name for field in schema if holds_images(field)]
    if not found or (len(found) > 1 and found.count("image") != 1):
        several = f"several columns of images ({', '.join(found)}), none of them called image"
        none = f"no column of images (bytes called {', '.join(IMAGE_COLUMNS)}, or a struct with bytes)"
        raise DataError(f"{path} has {several if found else none}: its columns are {', '.join(schema.names)}")
    return "image" if "image" in found else found[0]


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Column -> the names of its classes, as `datasets` keeps them in the schema."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {
            k: list(f["names"]) for k, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
