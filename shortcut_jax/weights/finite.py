"""Weights have to be finite: one NaN in any of them makes every image one."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shortcut_jax.core.tree import flat_paths
from shortcut_jax.errors import ConversionError
from shortcut_jax.weights.params import Params, Spec, spec_of

_CHUNK = 2**22
"""Values that are looked at together: what a check needs beside a tensor stays small."""
_NAMED = 3
"""Tensors that a message names; of others it says how many."""


def count_not_finite(values: np.ndarray) -> int:
    """How many values are NaN or infinite; those of ml_dtypes by their bits, which numpy compares far faster."""
    if values.dtype.kind not in "fV":
        return 0
    flat, exponent = values.ravel(order="K"), 0
    if values.dtype.name == "bfloat16":
        flat, exponent = flat.view(np.uint16), 0x7F80
    chunks = (flat[i : i + _CHUNK] for i in range(0, flat.size, _CHUNK))
    if exponent:
        return sum(int(np.count_nonzero((c & exponent) == exponent)) for c in chunks)
    return sum(c.size - int(np.count_nonzero(np.isfinite(c))) for c in chunks)


def check_finite(name: str, values: np.ndarray, origin: str = "") -> np.ndarray:
    """The values themselves.

    Raises:
      ConversionError: some of them are NaN or infinite; the message names the tensor.
    """
    if bad := count_not_finite(values):
        where = f"{origin}: " if origin else ""
        raise ConversionError(
            f"{where}{name} has {bad:,} of {values.size:,} values that are NaN or infinite: the file is damaged, or "
            "comes from a training that diverged; take another one"
        )
    return values


@jax.jit
def _all_finite(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: jnp.all(jnp.isfinite(x)) for path, x in leaves.items()}


def check_placed(tree: Any, origin: str) -> Any:
    """A tree of arrays on devices itself; each device looks at its own shards, and all processes find the same.

    Raises:
      ConversionError: some values are NaN or infinite; the message names `origin` and the tensors.
    """
    leaves = {path: x for path, x in flat_paths(tree).items() if jnp.issubdtype(x.dtype, jnp.floating)}
    bad = [path for path, well in jax.device_get(_all_finite(leaves)).items() if not well]
    if bad:
        dtypes = ", ".join(sorted({str(leaves[path].dtype) for path in bad}))
        more = f" and {len(bad) - _NAMED:,} more" if len(bad) > _NAMED else ""
        raise ConversionError(
            f"{origin}: {', '.join(bad[:_NAMED])}{more} {'has' if len(bad) == 1 else 'have'} values that are NaN or "
            f"infinite in {dtypes}: the file is damaged, or comes from a training that diverged; take another one"
        )
    return tree


class Finite(Params):
    """Arrays that are checked as each is read, after a cast or a merge."""

    def __init__(self, arrays: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray] | None = None):
        """Takes the arrays, and what they were made from where they are cast or merged, to tell which of them broke."""
        self._arrays, self._before = arrays, before

    def spec(self, name: str) -> Spec:
        """See `Params`."""
        return spec_of(self._arrays, name)

    def __getitem__(self, name: str) -> np.ndarray:
        """See `check_finite`."""
        with np.errstate(over="ignore", invalid="ignore"):  # told below, by name
            values = self._arrays[name]
        if self._before is not None and count_not_finite(values):
            check_finite(name, self._before[name])
            raise ConversionError(
                f"{name} has values beyond the range of {values.dtype.name}: convert with --dtype=float32"
            )
        return check_finite(name, values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)
