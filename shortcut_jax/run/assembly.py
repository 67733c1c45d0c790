"""From settings and devices to a compiled run: mesh, network, shardings, the jitted step and its initial state."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from shortcut_jax.cluster.distributed import platform_of
from shortcut_jax.config.derive import (
    check_tensor,
    global_batch,
    mesh_shape,
    model_config,
    objective_settings,
    step_settings,
)
from shortcut_jax.config.schema import Settings
from shortcut_jax.core.latents import PATCH
from shortcut_jax.core.tree import flat_paths
from shortcut_jax.core.types import Batch, Condition
from shortcut_jax.data.format import PreparedSet, Size
from shortcut_jax.data.records import data_folder, is_prepared, latent_size
from shortcut_jax.data.training import TrainingData
from shortcut_jax.data.words import encode_words
from shortcut_jax.errors import ConfigError
from shortcut_jax.models.flops import step_flops
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.models.init import BASE_DTYPE, init_params, weight_shapes
from shortcut_jax.models.lora import init_adapters
from shortcut_jax.runtime.device_table import peak_flops
from shortcut_jax.runtime.sharding import (
    batch_sharding,
    make_constrain,
    make_mesh,
    make_per_shard,
    own_device,
    replicated,
    tree_shardings,
)
from shortcut_jax.runtime.xla_options import compiler_options
from shortcut_jax.steps.networks import Frozen, evaluations
from shortcut_jax.steps.objectives import OBJECTIVES, row_group
from shortcut_jax.steps.optim import make_optimizer
from shortcut_jax.steps.state import TrainState, init_state
from shortcut_jax.steps.train_step import make_train_step
from shortcut_jax.weights.rules import nest

STORED_TEXT_DTYPE = jnp.bfloat16
"""What stored T5 states reach the devices in."""


class Assembly:
    """Everything that a main needs of a run, built from settings. Only `init_state` and `freeze` put arrays on devices.

    Attributes:
      settings: as given.
      platform: of the devices; see `platform_of`.
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
        self.platform = platform_of(devices[0])
        model = model_config(settings, self.platform)
        self.mesh_shape = shape
        self.mesh = make_mesh(shape, devices)
        check_tensor(model, shape)
        self.model = dataclasses.replace(
            model, constrain=make_constrain(self.mesh, settings.mesh.min_shard), per_shard=make_per_shard(self.mesh)
        )
        if settings.train == "lora":
            _ = self.state_shapes  # paths that match no layer are reported at once

    @property
    def latent_size(self) -> tuple[int, int]:
        """Rows and columns of the latents."""
        return latent_size(self.settings.data)

    @property
    def num_image_tokens(self) -> int:
        """N, of an image of the size in the settings."""
        return self._image_tokens()

    def _image_tokens(self, size: Size | None = None) -> int:
        height, width = latent_size(self.settings.data, size)
        return height // PATCH * (width // PATCH)

    @property
    def evaluations(self) -> tuple[int, int, int]:
        """See `steps.networks.evaluations`."""
        s = self.settings
        return evaluations(s.guidance_mode, s.train == "lora", s.teacher_share > 0)

    def flops(self, size: Size | None = None) -> int:
        """Model FLOPs of one step of images of `size`, by default that in the settings."""
        s = self.settings
        student, first, slow = self.evaluations
        group = row_group(objective_settings(s))
        passes = OBJECTIVES[s.objective].target_passes or (first + slow) * s.jumps // 2
        rolled = group.rolled_rows * slow * s.rolled_steps
        jumped = self.batch_size // group.size * (group.distilled * passes + rolled)
        tokens = self._image_tokens(size), s.data.text_tokens
        return step_flops(self.model, *tokens, self.batch_size * student, jumped, frozen=s.train == "lora")

    @property
    def peak_flops(self) -> float | None:
        """Peak FLOP/s of all devices together, where their kind is known."""
        peak = peak_flops(self.mesh.devices.flat[0])
        return peak * self.mesh_shape.devices if peak else None

    def batch_shapes(self, size: Size | None = None) -> Batch:
        """The global batch as abstract arrays with their shardings, of images of `size`, by default the settings'."""
        cfg, data, sharding = self.model, self.settings.data, batch_sharding(self.mesh)
        text_dtype = STORED_TEXT_DTYPE if data.text_encoder == "stored" else jnp.float32
        rows = (
            ((*latent_size(data, size), cfg.channels // PATCH**2), jnp.float32),
            ((data.text_tokens, cfg.text_width), text_dtype),
            ((cfg.pooled_width,), jnp.float32),
        )
        return Batch(*(jax.ShapeDtypeStruct((self.batch_size, *s), d, sharding=sharding) for s, d in rows))

    @cached_property
    def state_shapes(self) -> TrainState:
        """The train state as abstract arrays with their shardings."""
        return self._placed(jax.eval_shape(self._start, weight_shapes(self.model), None, None))

    @cached_property
    def network_shapes(self) -> Any:
        """The weights of the whole network, in the dtype that they start in, with their shardings."""
        if self.settings.train == "lora":
            return self.state_shapes.frozen.base
        return self.state_shapes.params

    def _placed(self, shapes: Any) -> Any:
        shardings = tree_shardings(self.mesh, shapes, self.settings.mesh.min_shard)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    def _start(self, weights: Any, adapters: Any, teacher: Any) -> TrainState:
        s = self.settings
        if s.train == "lora":
            fresh = self._fresh_adapters(weights)
            teacher = fresh if s.teacher_lora and teacher is None else teacher
            start = teacher if adapters is None else adapters
            train = fresh if start is None else start
        else:
            train = weights
        return init_state(train, make_optimizer(s.optimizer, s.steps), self._freeze(weights, teacher))

    def _fresh_adapters(self, weights: Any) -> Any:
        shapes = {path: leaf.shape for path, leaf in flat_paths(weights).items()}
        key, lora = jax.random.fold_in(jax.random.key(self.settings.seed), 1), self.settings.lora
        adapters = init_adapters(key, shapes, lora.rank, lora.paths)
        if not adapters:
            layers = [p.removesuffix("/kernel") for p in shapes if p.endswith("/kernel")]
            raise ConfigError(
                f"lora.paths={lora.paths!r} matches no layer: it has to match a whole path, such as {layers[0]} or "
                f"{layers[-1]}"
            )
        return nest(adapters)

    def _freeze(self, weights: Any, teacher: Any) -> Frozen:
        s = self.settings
        base = jax.tree.map(lambda x: x.astype(BASE_DTYPE), weights) if s.has_base else None
        scale = jnp.asarray(s.lora.scale, jnp.float32) if s.train == "lora" else None
        unconditional = None
        if s.guidance_mode != "embedded":
            txt, vec = empty_caption(s, self.model)
            unconditional = Condition(jnp.asarray(txt)[None], jnp.asarray(vec)[None])
        # A copy: the student may start from the teacher's adapters, and donated buffers must not alias.
        return Frozen(base, scale, jax.tree.map(jnp.copy, teacher), unconditional)

    def init_state(self, weights: Any = None, adapters: Any = None, teacher: Any = None) -> TrainState:
        """The state before the first step. Each device computes its own shards.

        Args:
          weights: of the whole network (`network_shapes`), donated; random ones by default.
          adapters: what training starts from; the teacher's or fresh ones by default.
          teacher: adapters of the teacher.
        """
        shardings = jax.tree.map(lambda x: x.sharding, self.state_shapes)
        if weights is None:
            draw = _random_weights(self.model, self.mesh, self.settings.mesh.min_shard)
            weights = draw(jax.random.key(self.settings.seed))
        return jax.jit(self._start, out_shardings=shardings, donate_argnums=0)(weights, adapters, teacher)

    def freeze(self, weights: Any = None, teacher: Any = None) -> Frozen:
        """What is frozen alone, for a state whose other parts are restored; `weights` are donated."""
        shardings = jax.tree.map(lambda x: x.sharding, self.state_shapes.frozen)
        return jax.jit(self._freeze, out_shardings=shardings, donate_argnums=0)(weights, teacher)

    @cached_property
    def train_step(self) -> Any:
        """The jitted train step (state, batch) -> (state, metrics); the state is donated."""
        state = jax.tree.map(lambda x: x.sharding, self.state_shapes)
        batch = jax.tree.map(lambda x: x.sharding, self.batch_shapes())
        return jax.jit(
            make_train_step(step_settings(self.settings, self.model)),
            in_shardings=(state, batch),
            out_shardings=(state, replicated(self.mesh)),
            donate_argnums=0,
            compiler_options=compiler_options(own_device(self.mesh)),
        )


@lru_cache(maxsize=16)
def _random_weights(cfg: FluxConfig, mesh: Mesh, min_shard: int) -> Callable[[jax.Array], Any]:
    """Key -> weights, each device its own shards; compiled once for all runs of such a network."""
    return jax.jit(partial(init_params, cfg), out_shardings=tree_shardings(mesh, weight_shapes(cfg), min_shard))


def mean_flops(assembly: Assembly, data: TrainingData) -> int:
    """Model FLOPs of a step, on average over the buckets of an epoch."""
    sizes = zip(data.buckets, data.epoch_sizes, strict=True)
    return sum(n * assembly.flops(size) for size, n in sizes) // sum(data.epoch_sizes)


def empty_caption(settings: Settings, cfg: FluxConfig) -> tuple[Any, Any]:
    """Txt [M, T] and vec [V] of the empty caption: encoded, or as stored with the set.

    They are zeros where the set is not found, as in a dry run: then nothing but their shapes is looked at.
    """
    data = settings.data
    if data.text_encoder == "words":
        return text_encoder(settings, cfg)("")
    if is_prepared(data_folder(data)):
        return PreparedSet(data_folder(data)).prompts()[""]
    txt = jnp.zeros((data.text_tokens, cfg.text_width), STORED_TEXT_DTYPE)
    return txt, jnp.zeros(cfg.pooled_width, jnp.float32)


def text_encoder(settings: Settings, cfg: FluxConfig) -> Any:
    """Caption -> (txt [M, T], vec [V]) for data whose captions are encoded on the fly."""
    return partial(
        encode_words,
        num_tokens=settings.data.text_tokens,
        text_width=cfg.text_width,
        pooled_width=cfg.pooled_width,
    )
