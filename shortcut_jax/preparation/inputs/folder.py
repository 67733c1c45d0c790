"""A folder of images with a table: a row for each, with `file_name` and `prompt`, `caption` or `text`."""

import hashlib
import json
import posixpath
from array import array
from collections.abc import Iterator
from typing import Any

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
from shortcut_jax.preparation.inputs.tables import Table
from shortcut_jax.preparation.inputs.tree import Inside, Tree
from shortcut_jax.preparation.units import Skip, Unit


class FolderSource:
    """See the module; the fingerprint is that of the table, for looking at every image would take too long.

    Attributes:
      units: consecutive rows.
      num_items: both together.
      fingerprint: of the table, and of the names of those images.
      notes: what was found.
      unused: see `Source`.
    """

    def __init__(self, tree: Tree, table: Table, options: SourceOptions):
        """Reads the table once: which rows there are, and that none leads out of the folder.

        Raises:
          DataError: a row names a file outside the folder, no row is left or has a caption, or `where` cannot be read.
        """
        self._folder, self._table, self._field = tree.folder, table, options.caption_field
        self._where = _parse_where(options.where)
        self._places = array("Q")  # where the rows begin
        self._lines = array("Q")
        self._states = array("Q")  # a hash of each row
        self._duplicates: set[int] = set()
        digest = hashlib.sha256()
        named = self._scan(digest)
        if not self._places:
            chosen = f" for which {', '.join(options.where)}" if options.where else ""
            raise DataError(f"{table.path} has no row{chosen}")
        self.fingerprint = digest.hexdigest()
        self.num_items = len(self._places)
        self._unit = options.unit
        state = lambda first, end: hash_of(map(str, self._states[first:end]))
        self.units = consecutive(self.num_items, options.unit, "rows", state)
        # An image that no row names is one of them: a table may choose among the images of its folder.
        self.notes, self.unused = tree.rest({table.path.name, *(name for name in tree.files if _hash(name) in named)})

    def _scan(self, digest: Any) -> set[bytes]:
        """Finds the rows; returns hashes of the names in all of them."""
        seen, named, fields = set[bytes](), set[bytes](), _Fields(self._field)
        inside = Inside(self._folder)
        for place, line, row in self._table.scan(digest):
            name = _name(row)
            known = _hash(name)
            if isinstance(row, dict) and not self._chosen(row):
                named.add(known)
                continue
            fields.add(row)
            if name:
                if not inside.holds(name):
                    raise DataError(
                        f"{self._table.path}, line {line}: file_name {name!r} leads out of the folder; nothing was "
                        f"written. Correct or remove it"
                    )
                if known in seen:
                    self._duplicates.add(len(self._places))
                seen.add(known)
            stated = f"{line} {len(self._places) in self._duplicates} {row!r}".encode("utf-8", "backslashreplace")
            self._states.append(int.from_bytes(hashlib.blake2b(stated, digest_size=8).digest(), "big"))
            self._places.append(place)
            self._lines.append(line)
        fields.check(self._table)
        seen |= named
        return seen

    def _chosen(self, row: dict[str, Any]) -> bool:
        return all(name in row and _text(row[name]) == value for name, value in self._where)

    def items(self, unit: Unit) -> Iterator[Item | Skip]:
        """The rows of a unit; images are left to be read by whoever decodes them."""
        start = unit.index * self._unit
        stop = start + (unit.size or 0)
        rows = self._table.read(self._places[start:stop])
        for index, row in zip(range(start, stop), rows, strict=False):
            yield self._item(index, row)

    def _item(self, index: int, row: dict[str, Any] | Skip) -> Item | Skip:
        place = f"{self._table.path.name}:{self._lines[index]}"
        if isinstance(row, Skip):
            return row._replace(key=place)
        name = _name(row)
        if not name:
            return Skip(place, "missing field", "it has no file_name")
        key = _key(name)
        if index in self._duplicates:
            return Skip(key, "duplicate key", place)
        caption = caption_in(row, self._field)
        if caption is None:
            return Skip(key, "missing field", f"it has no {self._field or ', '.join(CAPTION_FIELDS)}")
        return captioned(key, self._folder / name, caption)


class _Fields:
    """Which fields the rows of a table have: a name that is in none of them is an error, not a million skips."""

    def __init__(self, caption_field: str | None):
        self._caption = caption_field
        self._first: list[str] = []
        self._named = self._captioned = False

    def add(self, row: dict[str, Any] | Skip) -> None:
        if isinstance(row, Skip):
            return
        self._first = self._first or [str(name) for name in row]
        self._named = self._named or "file_name" in row
        self._captioned = self._captioned or any(
            n in row for n in ([self._caption] if self._caption else CAPTION_FIELDS)
        )

    def check(self, table: Table) -> None:
        """Raises DataError where no row has a name, or a caption."""
        if not self._first or (self._named and self._captioned):
            return
        told = f"its fields are {', '.join(self._first)}"
        if not self._named:
            raise DataError(f"{table.path} has no file_name, the image of a row: {told}")
        if self._caption:
            raise DataError(f"--caption_field={self._caption} is in no row of {table.path}: {told}")
        raise DataError(
            f"{table.path} has no {', '.join(CAPTION_FIELDS)}: name the field of the captions with "
            f"--caption_field=FIELD; {told}"
        )


def _name(row: dict[str, Any] | Skip) -> str:
    """The file of a row, empty where it has none."""
    name = row.get("file_name") if isinstance(row, dict) else None
    return name if isinstance(name, str) else ""


def _hash(name: str) -> bytes:
    return hashlib.blake2b(_key(name).encode(), digest_size=8).digest()


def _key(name: str) -> str:
    return printable(posixpath.normpath(name))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _parse_where(where: tuple[str, ...]) -> list[tuple[str, str]]:
    pairs = [text.partition("=") for text in where]
    for text, (name, sign, _) in zip(where, pairs, strict=True):
        if not name or not sign:
            raise DataError(f"--where={text}: write it as field=value, for instance --where=variant=base")
    return [(name, value) for name, _, value in pairs]
