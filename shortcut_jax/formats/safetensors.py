"""Safetensors files, read lazily and written in any order, so that a model need not fit in memory.

The format (github.com/huggingface/safetensors): 8 bytes of header length, a JSON header {name: {dtype, shape,
data_offsets}}, then the data. The safetensors library validates each file; reading and writing are done here because
its numpy interface knows no float8 and writes only what is in memory at once.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import ml_dtypes
import numpy as np

from shortcut_jax.errors import SafetensorsError
from shortcut_jax.weights.params import Params, Spec, raw

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""Names of the format and what they are in numpy."""

INDEX_SUFFIX = ".safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<variant>\.\w+)?\.safetensors")
_NUMBER = re.compile(r"-\d{5}-of-\d{5}(?=\.|$)")
_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(?P<variant>\.\w+)?\.json")


class LazyTensors(Params):
    """Tensors of one or several files by name, each read when it is asked for.

    Attributes:
      metadata: the free-text entries of the files' headers.
    """

    def __init__(self, files: list[Path]):
        """Reads and validates the headers.

        Raises:
          SafetensorsError: a file is missing, cut off, not of this format, or of an unknown dtype; a name is in two.
        """
        self._places: dict[str, tuple[Path, int, Spec]] = {}
        self.metadata: dict[str, str] = {}
        for file in files:
            header, start = _read_header(file)
            self.metadata |= header.pop("__metadata__", {})
            for name, entry in header.items():
                if name in self._places:
                    raise SafetensorsError(f"{file}: {name} is in another file of this checkpoint too")
                if entry["dtype"] not in DTYPES:
                    raise SafetensorsError(f"{file}: {name} has dtype {entry['dtype']}, which cannot be read")
                spec = Spec(DTYPES[entry["dtype"]], tuple(entry["shape"]))
                self._places[name] = (file, start + entry["data_offsets"][0], spec)

    def spec(self, name: str) -> Spec:
        """See `Params`."""
        return self._places[name][2]

    def __getitem__(self, name: str) -> np.ndarray:
        file, start, spec = self._places[name]
        # Not a memory map, whose pages would count as this process's memory.
        data = np.fromfile(file, np.uint8, spec.nbytes, offset=start)
        return data.view(spec.dtype).reshape(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _read_header(file: Path) -> tuple[dict, int]:
    """The header and where the data begin, once the library has found the file sound."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise SafetensorsError(f"{file} is missing")
    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise SafetensorsError(f"{file} is cut off or not a safetensors file: {error}") from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(length)), 8 + length


def shard_files(path: Path) -> list[Path]:
    """The files of a checkpoint: the file itself, or the shards that a folder's index names; see `choose_files`."""
    return choose_files(path)[0]


def choose_files(path: Path) -> tuple[list[Path], list[str]]:
    """The files of a checkpoint, and the names of those beside them in its folder that are not read.

    Of a folder that has a model twice, as `model.safetensors` and in a variant such as `model.fp16.safetensors`, in
    shards or not, the full one is read; a variant that is alone is read.

    Raises:
      SafetensorsError: a folder without safetensors files, an index that names a shard which is not found, several
        indices, or shards whose numbers tell that others are missing.
    """
    if path.is_file() and not _INDEX.fullmatch(path.name):
        shard = _SHARD.fullmatch(path.name)
        if shard and int(shard["count"]) > 1:
            raise SafetensorsError(f"{path} is one of {int(shard['count'])} shards: give their folder, or their index")
        return [path], []
    folder = path if path.is_dir() else path.parent
    there = sorted(folder.glob("*.safetensors"))
    indices = [path]
    if path.is_dir():
        indices, families = sorted(filter(_is_index, folder.iterdir())), {_family(f.name) for f in folder.iterdir()}
        full = lambda file: _family(file.name).rpartition(".")[0] not in families - {""}
        indices, kept = [i for i in indices if full(i)], [file for file in there if full(file)]
    if len(indices) > 1:
        raise SafetensorsError(f"{folder} has several indices: give one of {', '.join(i.name for i in indices)}")
    if indices:
        try:
            names = sorted({Path(name).name for name in json.loads(indices[0].read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise SafetensorsError(f"{indices[0]} is not an index of shards: {error}") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise SafetensorsError(f"{indices[0]} names {', '.join(missing)}, which is not found: download it again")
        kept = [folder / name for name in names]
    if not kept:
        raise SafetensorsError(f"no safetensors file in {folder}")
    _check_numbers(kept)
    return kept, [file.name for file in there if path.is_dir() and file not in kept]


def _is_index(file: Path) -> bool:
    return _INDEX.fullmatch(file.name) is not None


def _family(name: str) -> str:
    """The name of a file or an index without the number of a shard and the ending; empty for other files."""
    if index := _INDEX.fullmatch(name):
        return f"{index['stem']}{index['variant'] or ''}"
    return _NUMBER.sub("", name.removesuffix(".safetensors")) if name.endswith(".safetensors") else ""


def _check_numbers(files: list[Path]) -> None:
    """Refuses shards whose numbers tell that others are missing."""
    sets: dict[tuple[str, str, int], set[int]] = {}
    for shard in filter(None, (_SHARD.fullmatch(file.name) for file in files)):
        sets.setdefault((shard["stem"], shard["variant"] or "", int(shard["count"])), set()).add(int(shard["number"]))
    for (stem, variant, count), numbers in sets.items():
        left = [f"{stem}-{i:05d}-of-{count:05d}{variant}.safetensors" for i in range(1, count + 1) if i not in numbers]
        if left:
            raise SafetensorsError(
                f"{files[0].parent}: {', '.join(left[:5])} of {count} shards are missing: download them again"
            )


def remove(path: Path) -> None:
    """Removes a file or a folder, if there is one: what an earlier attempt that was killed left."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class Writer:
    """One file, its tensors written in any order. A context manager: complete at its end, or absent."""

    def __init__(self, file: Path, specs: Mapping[str, Spec], metadata: dict[str, str]):
        """Lays out the file for tensors of the given dtypes and shapes; space is taken at once.

        Raises:
          OSError: no space is left, or the folder cannot be written.
        """
        self._file, self._partial = file, file.with_name(f".{file.name}.partial")
        codes = {dtype: code for code, dtype in DTYPES.items()}
        header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
        self._places: dict[str, tuple[int, Spec]] = {}
        end = 0
        for name, spec in specs.items():
            offsets = [end, end + spec.nbytes]
            header[name] = {"dtype": codes[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
            self._places[name] = (end, spec)
            end = offsets[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._left = {name: np.ones(spec.shape[:1] or 1, bool) for name, spec in specs.items()}  # rows to come
        remove(self._partial)
        self._stream = self._partial.open("wb")
        try:
            os.posix_fallocate(self._stream.fileno(), 0, self._start + end)
            self._stream.write(len(text).to_bytes(8, "little") + text)
        except BaseException:  # an interrupt too would leave a file as large as the model
            self._discard()
            raise

    def write(self, name: str, value: np.ndarray, first_row: int = 0) -> None:
        """Writes a tensor, or rows of it from `first_row` on, at its place, cast to its dtype."""
        place, (dtype, shape) = self._places[name]
        rows = value.shape[:1] or (1,)
        left = self._left[name][first_row : first_row + rows[0]]
        if value.shape[1:] != shape[1:] or value.ndim != len(shape) or left.shape != rows:
            where = f" from row {first_row} on" if first_row else ""
            raise ValueError(f"{name} has shape {value.shape}{where}, but {shape} was announced")
        if not left.all():
            raise ValueError(f"rows of {name} are written twice")
        row = Spec(dtype, shape[1:]).nbytes
        self._stream.seek(self._start + place + first_row * row)
        value = raw(value.astype(dtype, copy=False))
        self._stream.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        left[:] = False

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        left = sorted(name for name, rows in self._left.items() if rows.any())
        if kind is None and not left:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._partial.rename(self._file)
            return
        self._discard()
        if kind is None:
            raise ValueError(f"never written, or not all of it: {', '.join(left[:5])}")

    def _discard(self) -> None:
        self._stream.close()
        with contextlib.suppress(FileNotFoundError):
            self._partial.unlink()
