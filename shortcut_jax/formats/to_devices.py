"""Parameters of a source on the devices that want them."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from shortcut_jax.core.tree import flat_paths
from shortcut_jax.errors import ConversionError
from shortcut_jax.formats.inference_checkpoint import OrbaxParams
from shortcut_jax.weights.finite import check_placed
from shortcut_jax.weights.rules import nest


def place(params: Mapping[str, np.ndarray], shapes: Any, origin: str = "the weights") -> Any:
    """Parameters on devices as nested dicts, all of them finite, without the whole model in host memory.

    Args:
      params: by path, of a `Model`.
      shapes: what is wanted, as nested `jax.ShapeDtypeStruct` with shardings; values are cast to its dtypes.
      origin: what messages call them: the model, and its file or folder.

    Raises:
      ConvertedError: the files are damaged.
      ConversionError: values that are not finite.
    """
    wanted = flat_paths(shapes)
    if not isinstance(params, OrbaxParams):
        return check_placed(nest({name: _shard(params, name, w, origin) for name, w in wanted.items()}), origin)
    # Orbax reads the stored dtype; each device then casts its shards.
    stored = {k: jax.ShapeDtypeStruct(w.shape, params.spec(k).dtype, sharding=w.sharding) for k, w in wanted.items()}
    placed = flat_paths(params.place(nest(stored)))
    return check_placed(nest({k: placed.pop(k).astype(w.dtype) for k, w in wanted.items()}), origin)


def _shard(params: Mapping[str, np.ndarray], name: str, wanted: Any, origin: str) -> jax.Array:
    try:
        value = params[name]
    except ConversionError as error:  # of values that are read, widened or merged: it has their name, but no file
        raise ConversionError(f"{origin}: {error}") from error
    return jax.make_array_from_callback(wanted.shape, wanted.sharding, lambda index: value[index].astype(wanted.dtype))
