"""A folder of pictures with `metadata.jsonl`: a line for each, with `file_name` and `prompt`, `caption` or `text`."""

import hashlib
import json
import os
import posixpath
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shortcut_jax.data.format import DataError
from shortcut_jax.data.images import ENDINGS
from shortcut_jax.data.inputs.items import (
    CAPTION_FIELDS,
    Item,
    SourceOptions,
    caption_in,
    captioned,
    consecutive,
    printable,
)
from shortcut_jax.data.inputs.unused import SYSTEM_FILES, files_beside, kind_of_name
from shortcut_jax.data.units import Skip, Unit

METADATA = "metadata.jsonl"
NO_ROW = f"images without a row in {METADATA}"


class FolderSource:
    """See the module; the fingerprint is that of `metadata.jsonl`, for looking at every picture would take too long.

    Attributes:
      units: consecutive rows.
      num_items: rows that are read.
      fingerprint: of the metadata.
    """

    def __init__(self, folder: Path, options: SourceOptions):
        """Reads the metadata once: which rows there are, and that none leads out of the folder.

        Raises:
          DataError: a row names a file outside the folder, no row is left, or `where` cannot be read.
        """
        self._folder, self._field = folder, options.caption_field
        self._where = _parse_where(options.where)
        self._places = array("Q")  # where the rows begin
        self._lines = array("Q")
        self._duplicates: set[int] = set()
        self._unit = options.unit
        self._states: list[hashlib._Hash] = []  # of the rows of each unit
        self.fingerprint = self._scan()
        self.num_items = len(self._places)
        if not self.num_items:
            chosen = f" for which {', '.join(options.where)}" if options.where else ""
            raise DataError(f"{folder / METADATA} has no row{chosen}")
        units = consecutive(self.num_items, options.unit, "rows")
        self.units = [unit._replace(state=rows.hexdigest()) for unit, rows in zip(units, self._states, strict=True)]

    def _scan(self) -> str:
        digest, place, seen = hashlib.sha256(), 0, set()
        inside = _Inside(self._folder)
        with (self._folder / METADATA).open("rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                row = _parse(line)
                if line.strip() and (not isinstance(row, dict) or self._chosen(row)):
                    if len(self._places) % self._unit == 0:
                        self._states.append(hashlib.sha256())
                    self._states[-1].update(line)
                    name = row.get("file_name") if isinstance(row, dict) else None
                    if isinstance(name, str) and name:
                        inside.check(name, number)
                        known = _short(_key(name))
                        if known in seen:
                            self._states[-1].update(b"again")
                            self._duplicates.add(len(self._places))
                        seen.add(known)
                    self._places.append(place)
                    self._lines.append(number)
                place += len(line)
        return digest.hexdigest()

    def unused(self) -> dict[str, int]:
        """The files in the folder that no row names, chosen or not."""
        with (self._folder / METADATA).open("rb") as file:
            rows = (row for row in map(_parse, file) if isinstance(row, dict))
            names = {_short(_key(name)) for row in rows if isinstance(name := row.get("file_name"), str)}
        is_used = lambda path: path == METADATA or _short(printable(path)) in names
        return files_beside(self._folder, is_used, _kind)

    def _chosen(self, row: dict[str, Any]) -> bool:
        return all(name in row and _text(row[name]) == value for name, value in self._where)

    def items(self, unit: Unit) -> Iterator[Item | Skip]:
        """The rows of a unit; pictures are left to be read by whoever decodes them."""
        start = unit.index * self._unit
        with (self._folder / METADATA).open("rb") as file:
            for index in range(start, start + (unit.size or 0)):
                file.seek(self._places[index])
                yield self._item(index, file.readline())

    def _item(self, index: int, line: bytes) -> Item | Skip:
        row, place = _parse(line), f"{METADATA}:{self._lines[index]}"
        if isinstance(row, str):
            return Skip(place, "not UTF-8" if row.startswith("'utf-8'") else "bad JSON", row)
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            return Skip(place, "missing field", "it has no file_name")
        key = _key(name)
        if index in self._duplicates:
            return Skip(key, "duplicate key", place)
        caption = caption_in(row, self._field)
        if caption is None:
            return Skip(key, "missing field", f"it has no {self._field or ', '.join(CAPTION_FIELDS)}")
        return captioned(key, self._folder / name, caption)


class _Inside:
    """Looks that names stay inside a folder; a directory is read once."""

    def __init__(self, folder: Path):
        self._folder, self._real = folder, os.path.realpath(folder)
        self._links: dict[str, set[str]] = {}

    def check(self, name: str, line: int) -> None:
        """Raises DataError where a name leads out of the folder."""
        parts = name.replace("\\", "/").split("/")
        outside = posixpath.isabs(name) or ".." in parts or "\0" in name
        if not outside:
            directory, base = posixpath.split(posixpath.normpath(name))
            if base in self._links_of(directory, name, line):
                outside = not self._holds(os.path.realpath(self._folder / name))
        if outside:
            self._refuse(name, line)

    def _links_of(self, directory: str, name: str, line: int) -> set[str]:
        if directory not in self._links:
            path = self._folder / directory
            if not self._holds(os.path.realpath(path)):
                self._refuse(name, line)
            try:
                self._links[directory] = {e.name for e in os.scandir(path) if e.is_symlink()}
            except OSError:  # it is not there: its pictures are counted as missing
                self._links[directory] = set()
        return self._links[directory]

    def _holds(self, path: str) -> bool:
        return os.path.commonpath([self._real, path]) == self._real

    def _refuse(self, name: str, line: int) -> None:
        raise DataError(
            f"{self._folder / METADATA}, line {line}: file_name {name!r} leads out of the folder; "
            f"nothing was written. Correct or remove it"
        )


def _parse(line: bytes) -> dict[str, Any] | str:
    """A row, or what is wrong with it."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return str(error) or "nested too deeply"
    return row if isinstance(row, dict) else f"a {type(row).__name__}, not an object"


def _key(name: str) -> str:
    return printable(posixpath.normpath(name))


def _short(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=8).digest()


def _kind(path: str) -> str:
    kind = kind_of_name(path)
    return NO_ROW if kind != SYSTEM_FILES and path.lower().endswith(tuple(f".{e}" for e in ENDINGS)) else kind


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _parse_where(where: tuple[str, ...]) -> list[tuple[str, str]]:
    pairs = [text.partition("=") for text in where]
    for text, (name, sign, _) in zip(where, pairs, strict=True):
        if not name or not sign:
            raise DataError(f"--where={text}: write it as field=value, for instance --where=variant=base")
    return [(name, value) for name, _, value in pairs]
