"""Arrays in `.npz` files, whose headers are checked before anything is decompressed."""

import math
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Header(NamedTuple):
    """The header of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype


def read_headers(path: Path) -> dict[str, Header]:
    """The shape and type of each array in a file, by name; the arrays are not read.

    Raises:
      ValueError: it is no such file, or one of its arrays holds Python objects; in one line.
    """
    try:
        with path.open("rb") as file:
            if file.read(6) == b"\x93NUMPY":
                raise ValueError("it is one array (.npy), not a file of several (.npz)")
        with zipfile.ZipFile(path) as archive:
            return {item.filename.removesuffix(".npy"): _header(archive, item) for item in archive.infolist()}
    except Exception as error:  # zipfile and NumPy raise errors of many types for damaged files
        raise ValueError(first_line(error)) from error


def read_arrays(path: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """Some arrays of a file. Raises ValueError where one cannot be read; look at its header first."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except Exception as error:
        raise ValueError(first_line(error)) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut to 200 characters; its type where it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _header(archive: zipfile.ZipFile, item: zipfile.ZipInfo) -> Header:
    with archive.open(item) as file:
        if np.lib.format.read_magic(file) != (1, 0):  # later versions may have headers of gigabytes
            raise ValueError(f"{item.filename} is of a version of NumPy's format that is not read")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError(f"{item.filename} holds Python objects, which are not read")
    if not all(isinstance(side, int) and side >= 0 for side in shape):
        raise ValueError(f"{item.filename} has the shape {shape}")
    if math.prod(shape) * dtype.itemsize > item.file_size:
        raise ValueError(f"{item.filename} is cut off: it has {item.file_size:,} bytes for the shape {shape}")
    return Header(shape, dtype)
