"""Arrays by name whose shapes are known before a value is read, so that a model need not fit in memory."""

import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

_ALIGNMENT = 64  # bytes
_LARGE = 2**20  # bytes
_STRIP = 32  # rows: a cache line of 16-bit values
_THREADS = min(os.cpu_count() or 1, 8)


class Spec(NamedTuple):
    """What an array will be."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Params(Mapping[str, np.ndarray]):
    """Arrays by name, each read (or computed) when it is asked for."""

    @abstractmethod
    def spec(self, name: str) -> Spec:
        """Dtype and shape of an array, without reading it; KeyError where there is none."""

    def __contains__(self, name: object) -> bool:
        """Whether there is such an array, without reading it, which the default of mappings would."""
        try:
            self.spec(name)  # type: ignore[arg-type]  # whatever is no name has no spec
        except KeyError:
            return False
        return True


def spec_of(arrays: Mapping[str, np.ndarray], name: str) -> Spec:
    """The spec of one of several arrays, lazy or not."""
    if isinstance(arrays, Params):
        return arrays.spec(name)
    return Spec(arrays[name].dtype, tuple(arrays[name].shape))


def specs_of(arrays: Mapping[str, np.ndarray]) -> dict[str, Spec]:
    """The specs of arrays, lazy or not."""
    return {name: spec_of(arrays, name) for name in arrays}


def shapes_of(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """The shapes of arrays, lazy or not."""
    return {name: spec_of(arrays, name).shape for name in arrays}


def common_dtype(dtypes: set[np.dtype]) -> np.dtype:
    """The dtype of arrays that become one: theirs where it is the same, else float32."""
    return next(iter(dtypes)) if len(dtypes) == 1 else np.dtype(np.float32)


def raw(x: np.ndarray) -> np.ndarray:
    """The same bits as whole numbers, whatever the strides: numpy moves those far faster than bfloat16 or float8."""
    return x.view(f"u{x.dtype.itemsize}") if x.dtype.kind == "V" and x.dtype.itemsize <= 2 else x


def transposed(matrix: np.ndarray) -> np.ndarray:
    """A matrix turned round, contiguous if it is large.

    In strips and threads: numpy's own copy of a transposed matrix misses the cache at every value.
    """
    if matrix.nbytes < _LARGE or 0 in matrix.strides:  # small, or a shape without values
        return matrix.T
    result = np.empty(matrix.shape[::-1], matrix.dtype)

    def turn(first: int) -> None:
        for i in range(first * _STRIP, len(matrix), _STRIP * _THREADS):
            result[:, i : i + _STRIP] = matrix[i : i + _STRIP].T

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(turn, range(_THREADS)))
    return result


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array to be filled, aligned so that JAX on the host takes it without a copy."""
    size = Spec(dtype, shape).nbytes
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


class Cast(Params):
    """Floating-point arrays in another dtype."""

    def __init__(self, arrays: Mapping[str, np.ndarray], dtype: np.dtype):
        self._arrays, self._dtype = arrays, dtype

    def spec(self, name: str) -> Spec:
        """See `Params`."""
        return Spec(self._dtype, spec_of(self._arrays, name).shape)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name].astype(self._dtype, copy=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)
