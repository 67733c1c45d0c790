"""Prompts to images with a converted pipeline: tokenizers, T5 and CLIP, the transformer, the autoencoder."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from shortcut_jax.cluster.distributed import say
from shortcut_jax.config.bounds import (
    MAX_BATCH,
    MAX_IMAGES,
    MAX_SIDE,
    MAX_STEPS,
    MAX_TOKENS,
    check_prompts,
    check_seed,
    check_whole,
    is_unguided,
)
from shortcut_jax.core.latents import PATCH
from shortcut_jax.core.local_path import local_path
from shortcut_jax.core.schedules import Spacing
from shortcut_jax.core.types import Array, Condition
from shortcut_jax.data.records import to_pixels
from shortcut_jax.errors import ConvertedError
from shortcut_jax.inference.converted_editor import Editor
from shortcut_jax.inference.encoders import TextEncoders, VaeCodec, on_mesh, place_on, split_rows
from shortcut_jax.inference.generator import Draws, bound_of, draw_arrays, full_batches, numbered
from shortcut_jax.models.attention import choose_backend
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.runtime.sharding import MeshShape, make_mesh, make_per_shard
from shortcut_jax.sources.models import open_loras
from shortcut_jax.sources.pipeline import open_pipeline
from shortcut_jax.steps.sampling import draw_noise, make_sampler, noise_rows
from shortcut_jax.weights.lora import Merged
from shortcut_jax.weights.params import shapes_of

EMBEDDED_GUIDANCE = 3.5
"""What a model with a guidance embedding is conditioned on by default, as diffusers does."""


class Guidance(NamedTuple):
    """How a guidance scale acts.

    Attributes:
      embedded: what the guidance embedding is fed; None for a model without one.
      scale: of classifier-free guidance against the empty prompt, at two evaluations a step; 1 for none.
    """

    embedded: float | None
    scale: float

    def __str__(self) -> str:
        if self.embedded is not None:
            return f"guidance {self.embedded:g}: through the guidance embedding"
        if self.scale == 1.0:
            return "guidance: none"
        return f"guidance {self.scale:g}: classifier-free, two evaluations a step"


class TextToImage:
    """A converted pipeline: `TextToImage("flux1-schnell")("a red fox in the snow", steps=4)`.

    Weights are read on first use, each device its own shards, and stay in the dtype they are stored in.

    Attributes:
      models: by kind, `flux`, `vae`, `t5` and `clip`; their configs are constrained to the mesh.
      sampling: the shift rule, text length and text states of the pipeline.
      text: its text encoders.
      vae_codec: of its autoencoder.
      mesh: all devices along `fsdp`.
      compute_dtype: of activations and matrix products.
    """

    def __init__(
        self,
        folder: str | Path,
        compute_dtype: str | None = None,
        devices: Sequence[Any] | None = None,
        loras: Sequence[tuple[str | Path, float]] = (),
    ):
        """Opens `folder`; nothing but headers and tokenizers is read.

        Args:
          folder: made by `shortcut_jax.convert`.
          compute_dtype: bfloat16 on GPU and TPU and float32 on CPU, by default.
          devices: all, by default.
          loras: adapters (LoRA files, or workdirs that trained some) and their strengths; they are merged, in float32,
            as the weights are read.

        Raises:
          ConversionError: adapters of another base.
          ConvertedError: it is no converted folder, lacks a model or a tokenizer, or its models do not go together.
        """
        devices = list(jax.devices() if devices is None else devices)
        platform = devices[0].platform
        self.compute_dtype = compute_dtype or ("float32" if platform == "cpu" else "bfloat16")
        self.mesh = make_mesh(MeshShape(1, len(devices), 1), devices)
        folder, self._said = local_path(folder, "folder"), set[str]()
        parts = open_pipeline(folder)
        self.models, self.sampling = parts.models, parts.sampling
        flux = self.models["flux"].config
        attention = choose_backend("auto", platform, self.compute_dtype, flux.head_size)
        special: dict[str, Any] = {"flux": {"attention": attention, "per_shard": make_per_shard(self.mesh)}}
        for kind, model in self.models.items():
            self.models[kind] = on_mesh(model, self.mesh, self.compute_dtype, **special.get(kind, {}))
        self.text = TextEncoders(parts._replace(models=self.models), self.mesh)
        self.vae_codec = VaeCodec(self.models["vae"], self.mesh)
        if loras:
            self._add_loras([(local_path(path, "lora"), strength) for path, strength in loras])

    def _add_loras(self, loras: Sequence[tuple[Path, float]]) -> None:
        model = self.models["flux"]
        modules, notes = open_loras(loras, model.config)
        params = Merged(model.params, modules, shapes_of(model.params))
        origin = " ".join([model.origin, *(f"with {strength:g} x {path.name}" for path, strength in loras)])
        self.models["flux"] = model._replace(params=params, origin=origin, notes=(*model.notes, *notes))

    @cached_property
    def params(self) -> dict[str, Any]:
        """The weights of each model, on devices.

        Raises:
          ConvertedError: files are damaged, or parameters are missing.
          ConversionError: values that are not finite.
        """
        flux = place_on(self.mesh, self.models["flux"])
        return {"flux": flux, "vae": self.vae_codec.weights("decoder"), **self.text.params}

    def __call__(
        self,
        prompts: str | Sequence[str],
        steps: int = 4,
        guidance: float | None = None,
        height: int = 1024,
        width: int = 1024,
        num: int = 1,
        seed: int = 0,
        text_tokens: int | None = None,
        shift: float | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Images [len(prompts) * num, height, width, 3], uint8, those of a prompt together.

        Image i depends on its draw (the seed and i, by default) and its prompt only.

        Args:
          prompts: one or several; what does not fit is cut, which is said once.
          steps: sampling steps, at least 1.
          guidance: guidance scale. A model with a guidance embedding is conditioned on it (3.5 by default); for other
            models 0 and 1 mean none (the default); another scale is classifier-free guidance (two evaluations a step).
          height: of an image in pixels.
          width: of an image in pixels.
          num: images a prompt.
          seed: of the noise.
          text_tokens: length that prompts are padded or cut to for T5; the pipeline's by default.
          shift: timestep shift; the pipeline's for this size by default.
          **options: `draws`, the (seed, number in that seed) of each image's noise, by default the i-th of `seed`;
            `method`, `euler` or `heun`; `batch_size`, images sampled at once, by default one a device; `quiet`,
            whether the `cuts` go unsaid.

        Raises:
          ValueError: an argument is out of range (see `check`).
          ConvertedError: the weights cannot be read.
        """
        asked = (steps, guidance, height, width, num, seed, text_tokens, shift)
        return np.concatenate([self.images(x)[:n] for x, n in self._batches(prompts, *asked, **options)])

    def trajectory(self, prompts: str | Sequence[str], steps: int = 4, **options: Any) -> np.ndarray:
        """The images that each step aims at, and the result: [images, steps + 1, height, width, 3], uint8.

        Arguments and errors are those of a call; see `core.flow.predictions`.
        """
        parts = []
        for kept, num in self._batches(prompts, steps, trajectory=True, **options):
            along = kept[: steps + 1, :num]
            parts.append(np.stack([self.images(latents) for latents in along], axis=1))
        return np.concatenate(parts)

    def _batches(
        self,
        prompts: str | Sequence[str],
        steps: int,
        guidance: float | None = None,
        height: int = 1024,
        width: int = 1024,
        num: int = 1,
        seed: int = 0,
        text_tokens: int | None = None,
        shift: float | None = None,
        draws: Draws | None = None,
        method: str = "euler",
        batch_size: int | None = None,
        trajectory: bool = False,
        quiet: bool = False,
    ) -> Iterator[tuple[Array, int]]:
        """Latents of each batch, and how many of its rows are asked for."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self.check(prompts, steps, guidance, height, width, num, text_tokens, shift)
        scale = self.guidance(guidance).scale
        texts = [p for p in prompts for _ in range(num)]
        draws = numbered(draws, seed, len(texts))
        self.tell(prompts, text_tokens, quiet)
        batch = self.rounded(batch_size)
        negative = self.encode([""] * batch, guidance, text_tokens) if scale != 1.0 else None
        for rows, new in full_batches(len(texts), batch):
            condition = self.encode([texts[i] for i in rows], guidance, text_tokens)
            numbers = draw_arrays(draws, rows)
            noise_BNC = noise_rows(*numbers, self.models["flux"].config, *self.latent_size(height, width))
            asked = (height, width, steps, shift, negative, scale, method, trajectory)
            latents = self.denoise(noise_BNC, condition, *asked)
            yield latents, new

    def rounded(self, batch_size: int | None) -> int:
        """A batch size that divides over the devices; one image a device by default."""
        devices = self.mesh.devices.size
        size = 1 if batch_size is None else check_whole("batch_size", batch_size, MAX_BATCH)
        return -(-size // devices) * devices

    def images(self, latents_BhwC: Array) -> np.ndarray:
        """Images [B, height, width, 3], uint8, of latents.

        Raises:
          ConvertedError: values that are not finite.
        """
        images = np.asarray(self.decode(latents_BhwC))
        if not np.isfinite(images).all():
            raise ConvertedError(
                f"the images have values that are not finite (computed in {self.compute_dtype}), though the weights "
                f"are: some of them are too large; convert them again from a sound file"
            )
        return to_pixels(images)

    def check(
        self,
        prompts: Sequence[str],
        steps: int = 4,
        guidance: float | None = None,
        height: int = 1024,
        width: int = 1024,
        num: int = 1,
        text_tokens: int | None = None,
        shift: float | None = None,
    ) -> None:
        """Checks the arguments of a call without reading weights.

        Raises:
          ValueError: a size that is no multiple of twice a latent's, or a number out of range.
        """
        check_prompts(prompts)
        for name, side in {"height": height, "width": width}.items():
            check_whole(name, side, MAX_SIDE, -MAX_SIDE)
        unit = PATCH * self.models["vae"].config.factor
        if height < unit or width < unit or height % unit or width % unit:
            nearest = " x ".join(str(max(round(size / unit), 1) * unit) for size in (height, width))
            raise ValueError(
                f"height x width is {height} x {width}, but both must be multiples of {unit}: the nearest is {nearest}"
            )
        counts = {"prompts": (len(prompts), MAX_IMAGES), "steps": (steps, MAX_STEPS), "num": (num, MAX_IMAGES)}
        for name, (value, most) in counts.items():
            check_whole(name, value, most)
        if text_tokens is not None:
            check_whole("text_tokens", text_tokens, MAX_TOKENS)
        if shift is not None and not (math.isfinite(shift) and shift > 0):
            raise ValueError(f"shift is {shift:g}, but must be positive and finite")
        if guidance is not None and not math.isfinite(guidance):
            raise ValueError(f"guidance is {guidance:g}, but must be finite")
        if guidance is not None and guidance < 0:
            raise ValueError(f"guidance is {guidance:g}, but must not be negative")

    def guidance(self, guidance: float | None = None) -> Guidance:
        """What a guidance scale means for this model."""
        if self.models["flux"].config.guidance:
            return Guidance(EMBEDDED_GUIDANCE if guidance is None else guidance, 1.0)
        return Guidance(None, 1.0 if guidance is None or is_unguided(guidance) else guidance)

    def cuts(self, prompts: Sequence[str], text_tokens: int | None = None) -> list[str]:
        """A line for each prompt and text encoder that does not read all of it, with the text that is cut off."""
        return self.text.cuts(prompts, text_tokens)

    def tell(self, prompts: Sequence[str], text_tokens: int | None = None, quiet: bool = False) -> None:
        """Says each of the `cuts` once; not at all where the caller tells them, who is `quiet`."""
        for line in () if quiet else self.cuts(list(dict.fromkeys(prompts)), text_tokens):
            if line not in self._said:
                say(line)
                self._said.add(line)

    def encode(
        self, prompts: Sequence[str], guidance: float | None = None, text_tokens: int | None = None
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

    def denoise(
        self,
        noise_BNC: Array,
        condition: Condition,
        height: int,
        width: int,
        steps: int = 4,
        shift: float | None = None,
        negative: Condition | None = None,
        scale: float = 1.0,
        method: str = "euler",
        trajectory: bool = False,
    ) -> Array:
        """Latents [B, h, w, c] of images of `height` x `width` pixels, as the transformer leaves them.

        With `trajectory` those that the steps aim at, [S + 1, B, h, w, c], S at least `steps`.

        Args:
          noise_BNC: the state at t = 1.
          condition: of `encode`.
          height: in pixels.
          width: in pixels.
          steps: sampling steps.
          shift: timestep shift; the pipeline's at this number of image tokens by default.
          negative: what classifier-free guidance leads away from; None for one evaluation a step.
          scale: of classifier-free guidance.
          method: `euler` or `heun`.
          trajectory: see above.
        """
        num, tokens = noise_BNC.shape[:2]
        if shift is None:
            shift = self.sampling.shift.at(tokens)
        rows = jax.tree.map(partial(split_rows, self.mesh), (noise_BNC, condition, negative))
        with jax.set_mesh(self.mesh):
            args = (self.params["flux"], *rows, steps, float(shift), float(scale))
            size, bound = self.latent_size(height, width), bound_of(steps)
            latents = self._sample(*args, size=size, bound=bound, method=method, trajectory=trajectory)
        return latents[:, :num] if trajectory else latents[:num]

    def decode(self, latents_BhwC: Array) -> Array:
        """Images [B, height, width, 3] of latents, float32, about [-1, 1], whole on every device."""
        return self.vae_codec.images(latents_BhwC)

    @cached_property
    def _sample(self) -> Callable[..., Array]:
        return _sample_program(self.models["flux"].config, self.sampling.spacing)

    @cached_property
    def edit(self) -> Editor:
        """Changes images: a function (images, source_prompt, prompt, ...) -> images."""
        return Editor(self)


@lru_cache(maxsize=16)
def _sample_program(cfg: FluxConfig, spacing: Spacing) -> Callable[..., Array]:
    """Compiled once for each size, bound of the step count and method, for all pipelines of such a network."""

    @partial(jax.jit, static_argnames=("size", "bound", "method", "trajectory"))
    def sample(
        params: Any,
        noise_BNC: Array,
        condition: Condition,
        negative: Condition | None,
        steps: Array,
        shift: Array,
        scale: Array,
        size: tuple[int, int],
        bound: int,
        method: str,
        trajectory: bool,
    ) -> Array:
        # A shortcut model is conditioned on its step size at every step count: the record does not say which it knows.
        sampler = make_sampler(cfg, *size, bound, shift, bound, method, trajectory, spacing)
        return sampler(params, noise_BNC, condition, steps, negative, scale)

    return sample
