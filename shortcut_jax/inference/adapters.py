"""Adapters beside the weights of a converted pipeline, so that their strength is an argument of its program."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from shortcut_jax.formats.to_devices import place
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.runtime.sharding import tree_shardings
from shortcut_jax.sources.models import param_shapes
from shortcut_jax.weights.lora import Modules, record_of, scales, stack
from shortcut_jax.weights.rescale import rescaled
from shortcut_jax.weights.rules import nest


def placed_adapters(modules: Modules, config: FluxConfig, mesh: Mesh) -> Any:
    """The tree of adapters for `Adapted` with a scale of 1, in float32, on the devices of a mesh."""
    shapes = param_shapes("flux", config)
    arrays = rescaled(stack(modules, shapes), scales(record_of(modules), shapes), 1.0)
    wanted = nest({k: jax.ShapeDtypeStruct(x.shape, jnp.float32) for k, x in arrays.items()})
    sharded = lambda w, sharding: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding)
    return place(arrays, jax.tree.map(sharded, wanted, tree_shardings(mesh, wanted)))
