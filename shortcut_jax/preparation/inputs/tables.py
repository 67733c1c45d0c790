"""Tables that name images and their captions: `metadata.jsonl`, `metadata.csv` and `metadata.parquet`.

A table is read twice: once from its beginning to its end, and then the rows of a unit by the places they begin at.
"""

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from shortcut_jax.errors import DataError
from shortcut_jax.preparation.units import Skip


class Found(NamedTuple):
    """A row of a table.

    Attributes:
      place: where `Table.read` finds it.
      line: that people count, from 1.
      row: its fields; a Skip where it cannot be read.
    """

    place: int
    line: int
    row: dict[str, Any] | Skip


class Table(Protocol):
    """Rows, each with a `file_name` and a caption.

    Attributes:
      path: its file.
    """

    path: Path

    def scan(self, digest: Any) -> Iterator[Found]:
        """All rows that are not blank; `digest` is updated with all bytes of the file."""
        ...

    def read(self, places: Iterable[int]) -> Iterator[dict[str, Any] | Skip]:
        """The rows at some places."""
        ...


class JsonLines:
    """A JSON object a line; see `Table`."""

    def __init__(self, path: Path):
        self.path = path

    def scan(self, digest: Any) -> Iterator[Found]:
        """See `Table`."""
        place = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                if line.strip():
                    yield Found(place, number, parse_json(line))
                place += len(line)

    def read(self, places: Iterable[int]) -> Iterator[dict[str, Any] | Skip]:
        """See `Table`."""
        with self.path.open("rb") as file:
            for place in places:
                file.seek(place)
                yield parse_json(file.readline())


class Csv:
    """Comma-separated values below a line of names, quoted with `"`; see `Table`."""

    def __init__(self, path: Path):
        self.path = path
        self._names: list[str] = []

    def scan(self, digest: Any) -> Iterator[Found]:
        """See `Table`."""
        with self.path.open("rb") as file:
            lines = _Lines(file, digest)
            reader = csv.reader(lines, strict=True)
            header = _next(reader)
            if isinstance(header, Skip):
                raise DataError(f"the first line of {self.path} cannot be read as names of columns: {header.detail}")
            self._names = [name.strip().removeprefix("\ufeff") for name in header or ()]
            while True:
                place, line = lines.place, lines.number + 1
                values = _next(reader)
                if values is None:
                    return
                if values:
                    yield Found(place, line, self._row(values))

    def read(self, places: Iterable[int]) -> Iterator[dict[str, Any] | Skip]:
        """See `Table`."""
        with self.path.open("rb") as file:
            for place in places:
                file.seek(place)
                yield self._row(_next(csv.reader(_Lines(file), strict=True)) or [])

    def _row(self, values: list[str] | Skip) -> dict[str, Any] | Skip:
        if isinstance(values, Skip):
            return values
        if len(values) > len(self._names):
            told = f"{len(values)} fields below a header of {len(self._names)}: write captions with commas in quotes"
            return Skip("", "bad CSV", told)
        return dict(zip(self._names, values, strict=False))


class _Lines:
    """Decoded lines of a file, and where the next one begins."""

    def __init__(self, file: BinaryIO, digest: Any = None):
        self._file, self._digest = file, digest or hashlib.sha256()
        self.place, self.number = 0, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        self._digest.update(line)
        self.place += len(line)
        self.number += 1
        return line.decode("utf-8", "surrogateescape")  # names of files may be any bytes; captions are looked at


def _next(reader: Any) -> list[str] | Skip | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        return Skip("", "bad CSV", str(error))


class ParquetTable:
    """A parquet file of names and captions, held in memory; see `Table`."""

    def __init__(self, path: Path):
        self.path = path
        self._rows: list[dict[str, Any]] = []

    def scan(self, digest: Any) -> Iterator[Found]:
        """See `Table`."""
        digest.update(self.path.read_bytes())
        with parquet_errors(self.path) as parquet:
            self._rows = parquet.read_table(self.path).to_pylist()
        for i, row in enumerate(self._rows):
            yield Found(i, i + 1, row)

    def read(self, places: Iterable[int]) -> Iterator[dict[str, Any] | Skip]:
        """See `Table`."""
        return (self._rows[place] for place in places)


class parquet_errors:  # noqa: N801  (a context manager, used as a function)
    """Gives `pyarrow.parquet`, and turns what it raises about a file into one line."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> Any:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise DataError(f"{self._path}: reading parquet files needs pyarrow: pip install pyarrow") from error
        return pyarrow.parquet

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import pyarrow

        if isinstance(error, pyarrow.ArrowException | OSError):
            told = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"{self._path} cannot be read as parquet: {told}") from error


def parse_json(data: bytes) -> dict[str, Any] | Skip:
    """A JSON object, or what is wrong with it."""
    try:
        row = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Skip("", "not UTF-8", str(error))
    except (ValueError, RecursionError) as error:
        return Skip("", "bad JSON", str(error) or "nested too deeply")
    return row if isinstance(row, dict) else Skip("", "bad JSON", f"a {type(row).__name__}, not an object")
