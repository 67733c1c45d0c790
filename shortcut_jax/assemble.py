"""From settings and devices to a compiled run: mesh, network, shardings, the jitted step and its initial state."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from shortcut_jax.core.latents import PATCH, image_ids, text_ids
from shortcut_jax.core.types import Batch
from shortcut_jax.data.records import latent_size
from shortcut_jax.data.words import encode_words
from shortcut_jax.models.attention import unsharded
from shortcut_jax.models.flops import step_flops
from shortcut_jax.models.flux import Flux, FluxConfig
from shortcut_jax.models.linear import no_constraint
from shortcut_jax.resolve import check_tensor, global_batch, mesh_shape, model_config, step_settings
from shortcut_jax.runtime.distributed import platform_of
from shortcut_jax.runtime.metrics import peak_flops
from shortcut_jax.runtime.sharding import (
    batch_sharding,
    make_constrain,
    make_mesh,
    make_per_shard,
    replicated,
    tree_shardings,
)
from shortcut_jax.settings import Settings
from shortcut_jax.steps.optim import make_optimizer
from shortcut_jax.steps.state import TrainState, init_state
from shortcut_jax.steps.train_step import make_train_step


class Assembly:
    """Everything that a main needs of a run, built from settings. Only `init_state` puts arrays on devices.

    Attributes:
      settings: as given.
      mesh: over all devices.
      model: the network, constrained to the mesh.
      batch_size: rows of the global batch.

    Raises:
      ConfigError: settings and devices do not go together.
    """

    def __init__(self, settings: Settings, devices: Sequence[Any] | None = None, training: bool = True):
        """Resolves `settings` on `devices` (all, by default); the batch has to divide only for `training`."""
        devices = list(jax.devices() if devices is None else devices)
        self.settings = settings
        shape = mesh_shape(settings, len(devices))
        self.batch_size = global_batch(settings, shape) if training else 0
        model = model_config(settings, platform_of(devices[0]))
        self.mesh_shape = shape
        self.mesh = make_mesh(shape, devices)
        check_tensor(model, shape)
        self.model = dataclasses.replace(
            model, constrain=make_constrain(self.mesh), per_shard=make_per_shard(self.mesh)
        )

    @property
    def latent_size(self) -> tuple[int, int]:
        """Rows and columns of the latents."""
        return latent_size(self.settings.data)

    @property
    def num_image_tokens(self) -> int:
        """N."""
        height, width = self.latent_size
        return height // PATCH * (width // PATCH)

    @property
    def flops(self) -> int:
        """Model FLOPs of one step."""
        s = self.settings
        jumped = 0 if s.objective == "flow" else self.batch_size // s.rows.size * s.rows.jumping * s.jumps
        return step_flops(self.model, self.num_image_tokens, s.data.text_tokens, self.batch_size, jumped)

    @property
    def peak_flops(self) -> float | None:
        """Peak FLOP/s of all devices together, where their kind is known."""
        peak = peak_flops(self.mesh.devices.flat[0])
        return peak * self.mesh_shape.devices if peak else None

    @cached_property
    def batch_shapes(self) -> Batch:
        """The global batch as abstract arrays with their shardings."""
        cfg, sharding = self.model, batch_sharding(self.mesh)
        shapes = (
            (*self.latent_size, cfg.channels // PATCH**2),
            (self.settings.data.text_tokens, cfg.text_width),
            (cfg.pooled_width,),
        )
        dtype = jnp.dtype(jnp.float32)
        return Batch(*(jax.ShapeDtypeStruct((self.batch_size, *s), dtype, sharding=sharding) for s in shapes))

    @cached_property
    def state_shapes(self) -> TrainState:
        """The train state as abstract arrays with their shardings."""
        shapes = jax.eval_shape(self._init, jax.random.key(0))
        shardings = tree_shardings(self.mesh, shapes)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    def _init(self, key: jax.Array) -> TrainState:
        return init_state(init_params(self.model, key), make_optimizer(self.settings.optimizer, self.settings.steps))

    def init_state(self, params: Any = None) -> TrainState:
        """The state before the first step, from the given weights (which are donated) or from random ones.

        Each device computes its own shards.
        """
        shardings = jax.tree.map(lambda x: x.sharding, self.state_shapes)
        if params is not None:
            optimizer = make_optimizer(self.settings.optimizer, self.settings.steps)
            start = lambda given: init_state(given, optimizer)
            return jax.jit(start, out_shardings=shardings, donate_argnums=0)(params)
        return jax.jit(self._init, out_shardings=shardings)(jax.random.key(self.settings.seed))

    @cached_property
    def train_step(self) -> Any:
        """The jitted train step (state, batch) -> (state, metrics); the state is donated."""
        state = jax.tree.map(lambda x: x.sharding, self.state_shapes)
        batch = jax.tree.map(lambda x: x.sharding, self.batch_shapes)
        return jax.jit(
            make_train_step(step_settings(self.settings, self.model)),
            in_shardings=(state, batch),
            out_shardings=(state, replicated(self.mesh)),
            donate_argnums=0,
        )


def init_params(cfg: FluxConfig, key: jax.Array) -> Any:
    """Weights of a network from scratch; shapes of the inputs do not matter beyond their widths."""
    one = lambda *shape: jnp.zeros((1, *shape))
    optional = (one() if cfg.guidance else None, one() if cfg.step_size else None)
    inputs = (one(4, cfg.channels), one(), one(1, cfg.text_width), one(cfg.pooled_width))
    # Without constraints: a batch of one row does not divide over a mesh.
    plain = dataclasses.replace(cfg, constrain=no_constraint, per_shard=unsharded, attention="xla")
    model = Flux(plain)
    return model.init(key, *inputs, image_ids(4, 4), text_ids(1), *optional)["params"]


def text_encoder(settings: Settings, cfg: FluxConfig) -> Any:
    """Caption -> (txt [M, T], vec [V]) for data whose captions are encoded on the fly."""
    return partial(
        encode_words,
        num_tokens=settings.data.text_tokens,
        text_width=cfg.text_width,
        pooled_width=cfg.pooled_width,
    )
