"""Captions and images to what the transformer sees, and back: T5 and CLIP, and the two halves of the autoencoder."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from shortcut_jax.core.tree import flat_paths
from shortcut_jax.core.types import Array
from shortcut_jax.data.records import to_latents, to_pixels
from shortcut_jax.errors import ConvertedError
from shortcut_jax.formats.to_devices import place
from shortcut_jax.formats.tokenizers import Tokens
from shortcut_jax.models.clip import ClipConfig, ClipText
from shortcut_jax.models.t5 import T5Config, T5Encoder
from shortcut_jax.models.vae import Autoencoder, Moments, VaeConfig, latents_from
from shortcut_jax.runtime.sharding import (
    MeshShape,
    batch_sharding,
    make_constrain,
    make_mesh,
    replicated,
    tree_shardings,
)
from shortcut_jax.sources.models import Model, buildable_params, open_models
from shortcut_jax.sources.pipeline import PipelineParts, open_pipeline
from shortcut_jax.weights.rules import nest

_PIXELS_AT_ONCE = 2**20
"""Of the images that one device decodes together."""


def local_mesh() -> tuple[Mesh, str]:
    """A mesh of this process's devices alone, so that hosts work apart, and the dtype that they compute in."""
    devices = jax.local_devices()
    dtype = "float32" if devices[0].platform == "cpu" else "bfloat16"
    return make_mesh(MeshShape(1, len(devices), 1), devices), dtype


def on_mesh(model: Model, mesh: Mesh, compute_dtype: str, **changes: Any) -> Model:
    """The model computed on a mesh, in a dtype; `changes` are of its config."""
    if hasattr(model.config, "constrain"):
        changes["constrain"] = make_constrain(mesh)
    return model._replace(config=dataclasses.replace(model.config, compute_dtype=compute_dtype, **changes))


def place_on(mesh: Mesh, model: Model, part: str | None = None) -> Any:
    """The weights of a model on the devices of a mesh, as they are stored; `part` is a half of the autoencoder.

    Raises:
      ConvertedError: files are damaged, or parameters are missing.
      ConversionError: values that are not finite.
    """
    shapes, specs = buildable_params(model), model.specs
    shapes = shapes if part is None else {part: shapes[part]}
    shardings, wanted = flat_paths(tree_shardings(mesh, shapes)), {}
    for name, leaf in flat_paths(shapes).items():
        if name not in specs or specs[name].shape != leaf.shape:
            found = f"{specs[name].shape}, not {leaf.shape}" if name in specs else "missing"
            raise ConvertedError(f"{model.origin}: {name} is {found}: convert it again")
        wanted[name] = jax.ShapeDtypeStruct(leaf.shape, specs[name].dtype, sharding=shardings[name])
    return place(model.params, nest(wanted), model.where)


def split_rows(mesh: Mesh, x_B: Any) -> Array:
    """Rows split over the devices, the last one repeated until they divide."""
    padding = -len(x_B) % mesh.devices.size
    if padding:
        x_B = x_B[np.minimum(np.arange(len(x_B) + padding), len(x_B) - 1)]
    return jax.device_put(x_B, batch_sharding(mesh))


class TextEncoders:
    """T5 and CLIP with their tokenizers, on a mesh. Weights are read on first use.

    Attributes:
      models: `t5` and `clip`.
      text_tokens: M by default.
      states: `full` or `trimmed`, see `Sampling`.
    """

    def __init__(self, parts: PipelineParts, mesh: Mesh, states: str | None = None):
        """Takes an opened pipeline whose models are on the mesh (`on_mesh`); its own `states` by default."""
        self.models = {kind: parts.models[kind] for kind in ("t5", "clip")}
        self.text_tokens, self.states = parts.sampling.text_tokens, states or parts.sampling.text_states
        self._tokenizers, self._mesh = parts.tokenizers, mesh

    @cached_property
    def params(self) -> dict[str, Any]:
        """The weights of both, on devices. Raises ConvertedError where they cannot be read."""
        return {kind: place_on(self._mesh, model) for kind, model in self.models.items()}

    def _length(self, kind: str, text_tokens: int | None) -> int:
        if kind == "t5":
            return text_tokens or self.text_tokens
        return min(self._tokenizers["clip"].max_tokens, self.models["clip"].config.max_tokens)

    def t5_tokens(self, prompts: Sequence[str], text_tokens: int | None = None) -> Tokens:
        """T5's tokens of each prompt, their number without padding, and the text that is cut off."""
        return self._tokenizers["t5"](prompts, self._length("t5", text_tokens))

    def cuts(self, prompts: Sequence[str], text_tokens: int | None = None) -> list[str]:
        """A line for each prompt and text encoder that does not read all of it, with the text that is cut off."""
        lines = []
        for kind in ("clip", "t5"):
            tokenizer, length = self._tokenizers[kind], self._length(kind, text_tokens)
            for prompt, cut in zip(prompts, tokenizer(prompts, length).cuts, strict=True):
                if cut:
                    lines.append(f"{tokenizer.name} reads {length} tokens of {prompt[:40]!r}: {cut!r} is cut off")
        return lines

    def encode(self, prompts: Sequence[str], text_tokens: int | None = None) -> tuple[Array, Array]:
        """T5's states [B, M, T] and CLIP's pooled vector [B, V] of prompts, one row a prompt."""
        t5, clip = (self._tokenizers[k](prompts, self._length(k, text_tokens)) for k in ("t5", "clip"))
        length_B = t5.length_B if self.states == "trimmed" else np.full(len(prompts), t5.ids_BM.shape[1], np.int32)
        rows = (split_rows(self._mesh, x) for x in (t5.ids_BM, clip.ids_BM, length_B))
        with jax.set_mesh(self._mesh):
            txt_BMT, vec_BV = self._encode(self.params["t5"], self.params["clip"], *rows)
        return txt_BMT[: len(prompts)], vec_BV[: len(prompts)]

    @cached_property
    def _encode(self) -> Callable[..., tuple[Array, Array]]:
        return _text_program(self.models["t5"].config, self.models["clip"].config)


class VaeCodec:
    """The autoencoder's encoder and decoder on a mesh, each read on first use.

    Attributes:
      model: `vae`, its config computed on the mesh.
    """

    def __init__(self, model: Model, mesh: Mesh):
        """Takes an opened autoencoder that is on the mesh (`on_mesh`)."""
        self.model, self._mesh, self._params = model, mesh, dict[str, Any]()

    def weights(self, part: str) -> Any:
        """The weights of `encoder` or `decoder`, on devices. Raises ConvertedError where they cannot be read."""
        if part not in self._params:
            self._params[part] = place_on(self._mesh, self.model, part)
        return self._params[part]

    @property
    def params(self) -> dict[str, Any]:
        """The weights of both halves, on devices; each is read once, whatever asks for it."""
        return {**self.weights("decoder"), **self.weights("encoder")}

    def encode(self, pixels_BhwC: np.ndarray) -> Moments:
        """Images, uint8 -> the Gaussian of their latents, one row an image."""
        return self._run("encoder", pixels_BhwC)

    def latents(self, pixels_BhwC: np.ndarray) -> np.ndarray:
        """Images, uint8 -> their mean latents as the network sees them, float32."""
        return np.asarray(latents_from(self.encode(pixels_BhwC), self.model.config))

    def images(self, latents_BhwC: Any) -> Array:
        """Latents as the network sees them -> images [B, H, W, 3], float32, about [-1, 1], whole on every device."""
        return self._run("decoder", latents_BhwC)

    def decode(self, latents_BhwC: Any) -> np.ndarray:
        """Latents as the network sees them -> images [B, H, W, 3], uint8; any number, a few at once."""
        devices, (num, h, w) = self._mesh.devices.size, latents_BhwC.shape[:3]
        pixels = h * w * self.model.config.factor**2
        size = min(max(_PIXELS_AT_ONCE // pixels, 1), math.ceil(num / devices)) * devices
        parts = []
        for first in range(0, num, size):
            rows = np.minimum(np.arange(first, first + size), num - 1)
            parts.append(to_pixels(np.asarray(self.images(latents_BhwC[rows]))))
        return np.concatenate(parts)[:num]

    def _run(self, part: str, x_BhwC: Any) -> Any:
        with jax.set_mesh(self._mesh):
            out = self._functions[part](self.weights(part), split_rows(self._mesh, x_BhwC))
        return jax.tree.map(lambda x_B: x_B[: len(x_BhwC)], out)

    @cached_property
    def _functions(self) -> dict[str, Callable[..., Any]]:
        return _vae_programs(self.model.config, self._mesh)


def load_vae_codec(folder: str | Path) -> VaeCodec:
    """An autoencoder on this process's devices.

    Args:
      folder: with an autoencoder: of a set (`PreparedSet.folder / VAE`), a converted or a PyTorch one.

    Raises:
      ConvertedError, ConversionError, SafetensorsError: there is none, or it cannot be read.
    """
    folder = Path(folder)
    if not folder.exists():
        raise ConvertedError(f"the autoencoder {folder} is not found")
    model = next((m for m in open_models(folder) if m.kind == "vae"), None)
    if model is None:
        raise ConvertedError(f"{folder} holds no autoencoder")
    mesh, dtype = local_mesh()
    return VaeCodec(on_mesh(model, mesh, dtype), mesh)


def load_decoder(folder: str | Path) -> Callable[[Any], np.ndarray]:
    """Latents [B, h, w, C] as the network sees them -> images [B, H, W, 3], uint8; see `load_vae_codec`."""
    return load_vae_codec(folder).decode


def load_text_encoder(
    folder: str | Path, text_tokens: int, states: str
) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    """A function from a caption to T5 states [M, T], bfloat16 as prepared sets hold them, and CLIP's vector [V].

    Args:
      folder: converted, with T5, CLIP and their tokenizers.
      text_tokens: M.
      states: `full` or `trimmed`.

    Raises:
      ConvertedError: it lacks one of them, or cannot be read.
    """
    mesh, dtype = local_mesh()
    parts = open_pipeline(Path(folder), ("t5", "clip"), "captions need")
    models = {kind: on_mesh(model, mesh, dtype) for kind, model in parts.models.items()}
    text = TextEncoders(parts._replace(models=models), mesh, states)

    def encode(caption: str) -> tuple[np.ndarray, np.ndarray]:
        txt_1MT, vec_1V = (np.asarray(x, np.float32) for x in text.encode([caption], text_tokens))
        return txt_1MT[0].astype(ml_dtypes.bfloat16), vec_1V[0]

    return encode


@lru_cache(maxsize=16)
def _text_program(t5_config: T5Config, clip_config: ClipConfig) -> Callable[..., tuple[Array, Array]]:
    """Both text encoders, compiled once for all pipelines that have such ones."""
    t5, clip = T5Encoder(t5_config), ClipText(clip_config)

    @jax.jit
    def encode(
        t5_params: Any, clip_params: Any, t5_ids_BM: Array, clip_ids_BM: Array, length_B: Array
    ) -> tuple[Array, Array]:
        txt_BMT: Any = t5.apply({"params": t5_params}, t5_ids_BM)
        output: Any = clip.apply({"params": clip_params}, clip_ids_BM)
        kept_BM = jnp.arange(txt_BMT.shape[1]) < length_B[:, None]
        return jnp.where(kept_BM[..., None], txt_BMT, 0), output.pooled_BD

    return encode


@lru_cache(maxsize=16)
def _vae_programs(config: VaeConfig, mesh: Mesh) -> dict[str, Callable[..., Any]]:
    """The two halves of an autoencoder, compiled once for all that are like it."""
    vae = Autoencoder(config)

    def encode(params: Any, pixels_BhwC: Array) -> Any:
        return vae.apply({"params": params}, to_latents(pixels_BhwC), method="encode")

    def decode(params: Any, latents_BhwC: Array) -> Any:
        return vae.apply({"params": params}, latents_BhwC, method="decode")

    whole = replicated(mesh)
    return {"encoder": jax.jit(encode, out_shardings=whole), "decoder": jax.jit(decode, out_shardings=whole)}
