"""Records of TFDS sets stored as ArrayRecord; an error names the shard and the record that is damaged."""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from shortcut_jax.data.arrays import first_line
from shortcut_jax.errors import DataError

AGAIN = "copy the set again, or prepare it again"


class Piece(NamedTuple):
    """Records of a split that lie in one shard, `num` from the one at `first`."""

    path: Path
    first: int
    num: int


class Records(Sequence[dict[str, Any]]):
    """The records of a split by index, in storage order."""

    def __init__(self, source: Any, pieces: Sequence[Piece], optional: frozenset[str] = frozenset()):
        """Takes a data source of TFDS, where its records lie, and the fields that a record may lack."""
        self._source, self._pieces, self._optional = source, pieces, optional
        self._codec = list(itertools.accumulate(piece.num for piece in pieces))

    def __len__(self) -> int:
        return self._codec[-1] if self._codec else 0

    def __getitem__(self, index: Any) -> Any:
        """A record.

        Raises:
          DataError: it cannot be read or decoded.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            return self._complete(self._source[int(index)])
        except Exception as error:  # of Riegeli, protobuf or PIL, by what is damaged
            raise DataError(f"{self.place(index)} is damaged ({first_line(error)}): {AGAIN}") from error

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several records at once. Raises DataError where one of them cannot be read or decoded."""
        try:
            return list(map(self._complete, self._source.__getitems__(indices)))
        except Exception:
            return [self[index] for index in indices]  # one of which raises, with its name

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def _complete(self, record: dict[str, Any]) -> dict[str, Any]:
        """A record as it is. Raises ValueError where a field is missing, for which TFDS gives None."""
        for name, value in record.items():
            if value is None and name not in self._optional:
                raise ValueError(f"it has no {name}")
        return record

    def place(self, index: int) -> str:
        """Shard and record, in words."""
        which = bisect.bisect_right(self._codec, index)
        piece = self._pieces[which]
        before = self._codec[which - 1] if which else 0
        return f"record {index - before + piece.first:,} of {piece.path}"


def open_records(builder: Any, split: str, decoders: Any = None) -> Records:
    """The records of a split of a TFDS set, after a look at every shard: it exists and has its number of records.

    Raises:
      DataError: a shard is missing or damaged, or holds another number of records.
    """
    instructions = builder.info.splits[split].file_instructions
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(_check_shard, instructions))
    pieces = [Piece(Path(i.filename), i.skip, i.take) for i in instructions]
    features = builder.info.features or {}
    optional = frozenset(name for name, feature in features.items() if type(feature).__name__ == "Optional")
    return Records(builder.as_data_source(split=split, decoders=decoders), pieces, optional)


def _check_shard(instruction: Any) -> None:
    from array_record.python.array_record_module import ArrayRecordReader

    path, expected = Path(instruction.filename), instruction.examples_in_shard
    if not path.is_file():
        raise DataError(f"the shard {path} is missing: {AGAIN}")
    try:
        reader = ArrayRecordReader(str(path))
        num = reader.num_records()
        reader.close()  # which raises what the reader ran into
    except Exception as error:
        raise DataError(f"the shard {path} is damaged ({first_line(error)}): {AGAIN}") from error
    if num != expected:
        raise DataError(f"the shard {path} holds {num:,} records, but {expected:,} are expected: {AGAIN}")
