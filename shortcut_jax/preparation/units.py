"""Units: the pieces that a set is prepared in, each of them absent or done, whatever interrupts the work.

The work of a set lies in a folder of its own until the set is complete. A unit is done when its JSON file is there,
which is renamed into place after the records that it tells of; whatever else a unit left behind is written anew.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shortcut_jax.core.text import write_text
from shortcut_jax.data.format import SPLITS

WRITER_OPTIONS = "group_size:1,uncompressed"
"""A record is read by itself, at the speed of the disk."""

KEPT_CAPTIONS = 16
"""Different captions of a split that a unit tells of: those that images are drawn for by default."""


UNUSED = "unused "
"""Begins the names of sums that count what nothing is made of."""


class Unit(NamedTuple):
    """A piece of a source: what one process does at once, and what a shard is made of.

    Attributes:
      index: its place in the list of units.
      name: what it is, in words.
      size: its images, where that is known beforehand.
      state: changes when its part of the source does; "" where only the fingerprint of the whole is known.
      watched: its file and that file's `stamp`, where it is a file, or a part of one.
    """

    index: int  # type: ignore[assignment]  # a tuple has a method of that name
    name: str
    size: int | None
    state: str = ""
    watched: tuple[str, str] | None = None


class Record(NamedTuple):
    """A record that is to be written.

    Attributes:
      bucket: an index into the buckets of the set.
      fields: as `set_features` has them.
      sums: numbers that are added up over the set, for instance {"enlarged": 1}.
      watched: see `Skip`.
    """

    bucket: int
    fields: dict[str, Any]
    sums: dict[str, float] = {}  # noqa: RUF012  (never written to)
    watched: tuple[str, str] | None = None


class Skip(NamedTuple):
    """Something that is left out.

    Attributes:
      key: of the record that it would have been.
      reason: one of a few, by which they are counted.
      detail: in words.
      watched: the file that it came from and that file's `stamp`, where it is a file of its own: another stamp means
        that the unit has to be read again.
    """

    key: str
    reason: str
    detail: str = ""
    watched: tuple[str, str] | None = None


class Unused(NamedTuple):
    """Files or values beside the records that nothing is made of: they are counted, but no record is lost by them.

    Attributes:
      what: they are, one of a few texts by which they are counted.
      number: of them.
    """

    what: str
    number: int


@dataclass
class Done:
    """What came of a unit.

    Attributes:
      name: of the unit.
      buckets: split -> the bucket of each record.
      num_bytes: split -> bytes of its records.
      skipped: what was left out.
      sums: see `Record`.
      captions: split -> its first different captions.
      state: of its part of the source, when it was read.
    """

    name: str
    buckets: dict[str, list[int]] = field(default_factory=lambda: {s: [] for s in SPLITS})
    num_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    skipped: list[Skip] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    captions: dict[str, list[str]] = field(default_factory=lambda: {s: [] for s in SPLITS})
    state: str = ""

    @property
    def num_records(self) -> int:
        """Records of all splits."""
        return sum(map(len, self.buckets.values()))

    def add(self, split: str, record: Record, num_bytes: int) -> None:
        """Counts a record."""
        self.buckets[split].append(record.bucket)
        self.num_bytes[split] += num_bytes
        self.add_sums(record.sums)
        captions, caption = self.captions[split], record.fields["caption"]
        if len(captions) < KEPT_CAPTIONS and caption not in captions:
            captions.append(caption)

    def add_sums(self, sums: Mapping[str, float]) -> None:
        """Adds numbers to the sums."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value


def split_of(key: str, validation: float) -> str:
    """The split of a record, by a hash of its key: the same whatever else is in the set."""
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    return "validation" if number < validation * 2**64 else "train"


def records_path(work: Path, index: int, split: str) -> Path:
    """The records of a unit that is done."""
    return work / f"{index:06d}-{split}.array_record"


def done_path(work: Path, index: int) -> Path:
    """The file that says that a unit is done."""
    return work / f"{index:06d}.json"


def files_path(work: Path, index: int) -> Path:
    """The image files that the records of a unit were made of, a line each."""
    return work / f"{index:06d}.files"


def files_of(path: Path) -> Iterator[tuple[str, str]]:
    """Files and the stamps that they had when they were read, where they are listed."""
    with contextlib.suppress(FileNotFoundError), path.open(encoding="utf-8") as lines:
        for line in lines:
            name, stamped = json.loads(line)
            yield name, stamped


def done_units(work: Path) -> set[int]:
    """The units that are done."""
    return {int(path.stem) for path in work.glob("[0-9]*.json")}


def read_done(work: Path, index: int) -> Done:
    """What came of a unit that is done."""
    stored = json.loads(done_path(work, index).read_text(encoding="utf-8"))
    return Done(**{**stored, "skipped": [Skip(*skip) for skip in stored["skipped"]]})


def stamp(path: str | Path) -> str:
    """Changes when a file does, or comes or goes."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


def has_changed(path: str, stamped: str) -> bool:
    """Whether a file is another one than when it had a stamp."""
    return stamp(path) != stamped


def serializer(features: Any) -> Callable[[dict[str, Any]], bytes]:
    """Fields -> the bytes of a record, the same in every process.

    `features.serialize_example` writes the fields in an order that differs from process to process.
    """
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    inner = ExampleSerializer(features.get_serialized_info())

    def serialize(fields: dict[str, Any]) -> bytes:
        return inner.get_tf_example(features.encode_example(fields)).SerializeToString(deterministic=True)

    return serialize


def write_unit(
    work: Path,
    unit: Unit,
    produced: Iterable[Record | Skip | Unused],
    serialize: Callable[[dict[str, Any]], bytes],
    validation: float,
) -> Iterator[Done]:
    """Writes a unit, giving its state after each record; when it ends, the unit is done.

    Args:
      work: the folder of the work.
      unit: which one.
      produced: its records, and what is left out.
      serialize: see `serializer`.
      validation: share of the validation split.

    Raises:
      OSError: it cannot be written; its temporary files are gone.
    """
    done, read = Done(unit.name, state=unit.state), list[tuple[str, str]]()
    with _Files(work, unit.index) as files:
        for result in produced:
            if isinstance(result, Skip):
                done.skipped.append(result._replace(watched=result.watched or unit.watched))
            elif isinstance(result, Unused):
                done.add_sums({f"{UNUSED}{result.what}": result.number})
            else:
                split = split_of(result.fields["key"], validation)
                data = serialize(result.fields)
                files.write(split, data)
                done.add(split, result, len(data))
                read += [result.watched] if result.watched else []
            yield done
        files.finish(done)
    write_text(files_path(work, unit.index), "".join(f"{as_json(file)}\n" for file in read))
    write_json(done_path(work, unit.index), vars(done))


class _Files:
    """The record files of one unit, which get their names when all of them are on the disk."""

    def __init__(self, work: Path, index: int):
        self._work, self._index = work, index
        self._writers: dict[str, Any] = {}

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        for split, writer in self._writers.items():
            with contextlib.suppress(Exception):  # what is not finished is thrown away, in whatever state it is
                writer.close()
            self._temporary(split).unlink(missing_ok=True)

    def _temporary(self, split: str) -> Path:
        return self._work / f".{self._index:06d}-{split}.tmp"

    def write(self, split: str, data: bytes) -> None:
        if split not in self._writers:
            from array_record.python.array_record_module import ArrayRecordWriter

            self._temporary(split).unlink(missing_ok=True)
            self._writers[split] = ArrayRecordWriter(str(self._temporary(split)), WRITER_OPTIONS)
        self._writers[split].write(data)

    def finish(self, done: Done) -> None:
        for split, writer in self._writers.items():
            writer.close()
            path = self._temporary(split)
            with path.open("rb") as file:
                os.fsync(file.fileno())
            _check_written(path, len(done.buckets[split]))
        for split in SPLITS:
            target = records_path(self._work, self._index, split)
            if split in self._writers:
                self._temporary(split).rename(target)
            else:
                target.unlink(missing_ok=True)


def _check_written(path: Path, count: int) -> None:
    """A writer may have run out of disk without saying so."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    try:
        found = reader.num_records()
    finally:
        reader.close()
    if found != count:
        raise OSError(f"{path} holds {found:,} records of {count:,}")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON that is there as a whole or not at all."""
    write_text(path, as_json(value) + "\n")


def as_json(value: Any) -> str:
    """JSON in one line, its characters as they are unless UTF-8 has none for a byte of a file's name."""
    text = json.dumps(value, ensure_ascii=False)
    return text if _is_utf8(text) else json.dumps(value)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def counts(buckets: Iterable[int], num: int) -> tuple[int, ...]:
    """Records in each of `num` buckets."""
    return tuple(np.bincount(np.asarray(list(buckets), np.int64), minlength=num).tolist())
