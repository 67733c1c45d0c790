"""The models of a converted pipeline on devices: prompts to conditions, noise to latents, latents to images."""

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from shortcut_jax.cluster.distributed import SaidOnce
from shortcut_jax.config.bounds import (
    check_seed,
    is_unguided,
)
from shortcut_jax.core.latents import PATCH
from shortcut_jax.core.local_path import local_path
from shortcut_jax.core.schedules import Spacing
from shortcut_jax.core.types import Array, Condition
from shortcut_jax.data.records import to_pixels
from shortcut_jax.errors import ConvertedError
from shortcut_jax.inference.adapters import placed_adapters
from shortcut_jax.inference.encoders import TextEncoders, VaeCodec, on_mesh, place_on, split_rows
from shortcut_jax.inference.generator import bound_of
from shortcut_jax.inference.request import Guidance
from shortcut_jax.models.attention import choose_backend
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.runtime.device_table import require_float8
from shortcut_jax.runtime.sharding import MeshShape, make_mesh, make_per_shard
from shortcut_jax.sources.models import open_loras
from shortcut_jax.sources.pipeline import open_pipeline
from shortcut_jax.steps.networks import Adapted
from shortcut_jax.steps.sampling import draw_noise, make_sampler
from shortcut_jax.weights.lora import Merged
from shortcut_jax.weights.params import shapes_of

EMBEDDED_GUIDANCE = 3.5
"""What a model with a guidance embedding is conditioned on by default, as diffusers does."""


class Program(NamedTuple):
    """What a sampler is compiled for, besides the shapes of its arguments.

    Attributes:
      size: rows and columns of the latents.
      bound: the longest grid.
      method: of sampling.
      trajectory: whether it returns what its steps aim at.
    """

    size: tuple[int, int]
    bound: int
    method: str
    trajectory: bool


class ConvertedModels:
    """What `convert` wrote: the transformer, the autoencoder, T5 and CLIP with their tokenizers.

    Weights are read on first use, each device its own shards, and stay in the dtype they are stored in.

    Attributes:
      name: of the folder.
      models: by kind, `flux`, `vae`, `t5` and `clip`; their configs are constrained to the mesh.
      sampling: the shift rule, text length and text states of the pipeline.
      text: its text encoders.
      vae_codec: of its autoencoder.
      loras: adapters and their strengths.
      say_once: prints notices.
      mesh: all devices along `fsdp`.
      compute_dtype: of activations and matrix products.
      matmul_dtype: of the operands of the network's large products, where it is another one.
    """

    def __init__(
        self,
        folder: str | Path,
        compute_dtype: str | None = None,
        devices: Sequence[Any] | None = None,
        loras: Sequence[tuple[str | Path, float]] = (),
        merge: bool = True,
        matmul_dtype: str | None = None,
    ):
        """Opens `folder`; nothing but headers and tokenizers is read.

        Args:
          folder: made by `shortcut_jax.convert`.
          compute_dtype: bfloat16 on GPU and TPU and float32 on CPU, by default.
          devices: all, by default.
          loras: adapters (LoRA files, or workdirs that trained some) and their strengths.
          merge: whether they are merged, in float32, as the weights are read; else they stay beside the weights, so
            that each request can scale their strength.
          matmul_dtype: `float8` rounds the operands of the network's large products (see `models/float8.py`).

        Raises:
          ConfigError: float8 on a device that has no such products.
          ConversionError: adapters of another base.
          ConvertedError: it is no converted folder, lacks a model or a tokenizer, or its models do not go together.
        """
        devices = list(jax.devices() if devices is None else devices)
        platform = devices[0].platform
        require_float8(devices[0], "matmul_dtype", matmul_dtype)
        self.matmul_dtype = matmul_dtype
        self.compute_dtype = compute_dtype or ("float32" if platform == "cpu" else "bfloat16")
        self.mesh = make_mesh(MeshShape(1, len(devices), 1), devices)
        folder = local_path(folder, "folder")
        self.name, self.loras, self.adapters = folder.resolve().name, list(loras), None
        self.say_once = SaidOnce()
        parts = open_pipeline(folder)
        self.models, self.sampling = parts.models, parts.sampling
        flux = self.models["flux"].config
        attention = choose_backend("auto", platform, self.compute_dtype, flux.head_size)
        of_flux = {"attention": attention, "per_shard": make_per_shard(self.mesh), "matmul_dtype": matmul_dtype}
        special: dict[str, Any] = {"flux": of_flux}
        for kind, model in self.models.items():
            self.models[kind] = on_mesh(model, self.mesh, self.compute_dtype, **special.get(kind, {}))
        self.text = TextEncoders(parts._replace(models=self.models), self.mesh)
        self.vae_codec = VaeCodec(self.models["vae"], self.mesh)
        if loras:
            self._add_loras([(local_path(path, "lora"), strength) for path, strength in loras], merge)

    @property
    def computed(self) -> str:
        """How it computes, in words."""
        return f"computed in {self.compute_dtype}" + (f", products in {self.matmul_dtype}" if self.matmul_dtype else "")

    def _add_loras(self, loras: Sequence[tuple[Path, float]], merge: bool) -> None:
        model = self.models["flux"]
        modules, notes = open_loras(loras, model.config)
        if merge:
            params = Merged(model.params, modules, shapes_of(model.params))
            origin = " ".join([model.origin, *(f"with {strength:g} x {path.name}" for path, strength in loras)])
            model = model._replace(params=params, origin=origin)
        else:
            self.adapters = placed_adapters(modules, model.config, self.mesh)
        self.models["flux"] = model._replace(notes=(*model.notes, *notes))

    @cached_property
    def params(self) -> dict[str, Any]:
        """The weights of each model, on devices.

        Raises:
          ConvertedError: files are damaged, or parameters are missing.
          ConversionError: values that are not finite.
        """
        flux = place_on(self.mesh, self.models["flux"])
        if self.adapters is not None:
            flux = Adapted(flux, self.adapters, jnp.float32(1.0))
        return {"flux": flux, "vae": self.vae_codec.weights("decoder"), **self.text.params}

    @property
    def spacing(self) -> Spacing:
        """Of its sampling grids."""
        return self.sampling.spacing

    def guidance(self, scale: float | None = None) -> Guidance:
        """How a scale acts in this model."""
        if self.models["flux"].config.guidance:
            return Guidance(EMBEDDED_GUIDANCE if scale is None else scale, 1.0)
        return Guidance(None, 1.0 if scale is None or is_unguided(scale) else scale)

    @property
    def size_unit(self) -> int:
        """What sizes in pixels are multiples of."""
        return PATCH * self.models["vae"].config.factor

    def to_images(self, latents_BhwC: Array) -> np.ndarray:
        """Images [B, height, width, 3], uint8, of latents.

        Raises:
          ConvertedError: values that are not finite.
        """
        images = np.asarray(self.decode(latents_BhwC))
        if not np.isfinite(images).all():
            raise ConvertedError(
                f"the images have values that are not finite ({self.computed}), though the weights "
                f"are: some of them are too large; convert them again from a sound file"
            )
        return to_pixels(images)

    def encode(
        self, prompts: Sequence[Any], guidance: float | None = None, text_tokens: int | None = None
    ) -> Condition:
        """T5 states, CLIP's pooled vector and the embedded guidance of each prompt, one row a prompt."""
        embedded = self.guidance(guidance).embedded
        txt_BMT, vec_BV = self.text.encode(prompts, text_tokens)
        return Condition(txt_BMT, vec_BV, None if embedded is None else np.full(len(prompts), embedded, np.float32))

    def draw_noise(self, seed: int, first: int, num: int, height: int, width: int) -> Array:
        """Noise [num, N, C] of images `first` ... of a seed, for images of `height` x `width` pixels."""
        seed = check_seed(seed)
        return draw_noise(seed, first, num, self.models["flux"].config, *self.latent_size(height, width))

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the latents of an image of `height` x `width` pixels."""
        factor = self.models["vae"].config.factor
        return height // factor, width // factor

    def shift_at(self, height: int, width: int) -> float:
        """The timestep shift of images of `height` x `width` pixels."""
        rows, columns = self.latent_size(height, width)
        return self.sampling.shift.at(rows * columns // PATCH**2)

    def denoise(
        self,
        noise_BNC: Array,
        condition: Condition,
        size: tuple[int, int],
        steps: int = 4,
        shift: float | None = None,
        negative: tuple[Condition, float] | None = None,
        flux: Any = None,
        **how: Any,
    ) -> Array:
        """Latents [B, h, w, c] of images of `size` pixels, as the transformer leaves them.

        With `trajectory` those that the steps aim at, [S + 1, B, h, w, c], S at least `steps`.

        Args:
          noise_BNC: the state at t = 1.
          condition: of `encode`.
          size: height and width in pixels.
          steps: sampling steps.
          shift: timestep shift; the pipeline's at this size by default.
          negative: what classifier-free guidance leads away from, and its scale; None for one evaluation a step.
          flux: weights of the transformer; the pipeline's own by default.
          **how: `method`, `euler` by default, and `trajectory`, see above.
        """
        num, (empty, scale) = len(noise_BNC), negative or (None, 1.0)
        program = Program(
            self.latent_size(*size), bound_of(steps), how.get("method", "euler"), bool(how.get("trajectory"))
        )
        rows = jax.tree.map(partial(split_rows, self.mesh), (noise_BNC, condition, empty))
        shift = self.shift_at(*size) if shift is None else shift
        with jax.set_mesh(self.mesh):
            flux = self.params["flux"] if flux is None else flux
            latents = self._sample(flux, *rows, steps, float(shift), float(scale), program=program)
        return latents[:, :num] if program.trajectory else latents[:num]

    def decode(self, latents_BhwC: Array) -> Array:
        """Images [B, height, width, 3] of latents, float32, about [-1, 1], whole on every device."""
        return self.vae_codec.images(latents_BhwC)

    @cached_property
    def _sample(self) -> Callable[..., Array]:
        return _sample_program(self.models["flux"].config, self.sampling.spacing)


@lru_cache(maxsize=16)
def _sample_program(cfg: FluxConfig, spacing: Spacing) -> Callable[..., Array]:
    """Compiled once for each `Program`, for all pipelines of such a network."""

    @partial(jax.jit, static_argnames="program")
    def sample(
        params: Any,
        noise_BNC: Array,
        condition: Condition,
        negative: Condition | None,
        steps: Array,
        shift: Array,
        scale: Array,
        program: Program,
    ) -> Array:
        # A shortcut model is conditioned on its step size at every step count: the record does not say which it knows.
        size, bound, method, trajectory = program
        sampler = make_sampler(cfg, size, bound, shift, bound, method, trajectory, spacing)
        return sampler(params, noise_BNC, condition, steps, negative, scale)

    return sample
