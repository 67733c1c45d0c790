"""What a prepared set of latents is made with: images and captions to the fields of records, and what lies beside."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from shortcut_jax.core.fingerprint import fingerprint
from shortcut_jax.core.latents import PATCH
from shortcut_jax.core.tree import flat_paths
from shortcut_jax.data.format import TEXT_DTYPES, VAE, LatentInfo, Size, TextInfo, pack_text
from shortcut_jax.errors import DataError
from shortcut_jax.formats.export import write_component
from shortcut_jax.inference.encoders import TextEncoders, VaeCodec, local_mesh, on_mesh
from shortcut_jax.preparation.images import Cropped
from shortcut_jax.preparation.units import Record, Unit
from shortcut_jax.sources.pipeline import open_pipeline


class SetMaker:
    """What the latents of a set share, whether an autoencoder or a teacher makes them.

    Attributes:
      batch_size: rows at once; batches are padded to it.
      text: the text encoders.
      vae_codec: of the autoencoder.
      text_info: how text states are stored.
      latents: the scale of the latents.
    """

    def __init__(self, text: TextEncoders, vae_codec: VaeCodec, text_tokens: int, text_dtype: str, batch_size: int):
        """Takes models on devices, M, and a key of `TEXT_DTYPES`."""
        self.text, self.vae_codec, self.batch_size = text, vae_codec, batch_size
        widths = text.models["t5"].config.width, text.models["clip"].config.width
        self.text_info = TextInfo(text.states, text_dtype, text_tokens, *widths)
        c = vae_codec.model.config
        self.latents = LatentInfo(c.latent_channels, c.factor, c.scale, c.shift)

    @cached_property
    def encoders(self) -> dict[str, dict[str, str]]:
        """Origin and content of each model; its weights are read."""
        params = {**self.text.params, "vae": self.vae_codec.params}
        content = {kind: fingerprint(held) for kind, held in params.items()}
        return {kind: {"origin": self._origin(kind), "content": content[kind]} for kind in sorted(content)}

    def _origin(self, kind: str) -> str:
        return (self.vae_codec.model if kind == "vae" else self.text.models[kind]).origin

    def job_fields(self, **request: Any) -> dict[str, Any]:
        """Fields of `writing.Job`, its `request` among them."""
        asked = {f"text_{name}": getattr(self.text_info, name) for name in ("states", "tokens", "dtype")}
        asked |= {"encoders": {kind: told["content"] for kind, told in self.encoders.items()}}
        told = {"text": self.text_info, "latents": self.latents, "encoders": self.encoders}
        return {**told, "prompts": self.prompts, "complete": self.complete, "request": asked | request}

    def bytes_per_record(self, size: Size) -> int:
        """About the least that a record of a bucket takes on the disk; (0, 0) is one without an image."""
        info, stride = self.text_info, self.latents.stride
        tokens = info.tokens if info.states == "full" else min(4, info.tokens)
        moments = 2 * 2 * math.prod(size) // stride**2 * self.latents.channels
        return moments + tokens * info.width * np.dtype(TEXT_DTYPES[info.dtype]).itemsize + 4 * info.pooled_width

    def prompts(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """The text states of the empty caption and of others: txt [1 + P, M, T] bfloat16, vec [1 + P, V] float32."""
        rows, parts = ["", *captions], []
        for first in range(0, len(rows), self.batch_size):
            chunk = rows[first : first + self.batch_size]
            encoded = self.text.encode(padded(chunk, self.batch_size), self.text_info.tokens)
            parts.append([np.asarray(x, np.float32)[: len(chunk)] for x in encoded])
        txt, vec = (np.concatenate(x) for x in zip(*parts, strict=True))
        return {"txt": txt.astype(ml_dtypes.bfloat16), "vec": vec}

    def complete(self, folder: Path, sums: Mapping[str, float]) -> dict[str, Any]:
        """Puts the autoencoder into the folder of a set; the error of its text states, and how many were cut."""
        self.copy_vae(folder / VAE)
        square, error = sums.get("state_square", 0.0), sums.get("error_square", 0.0)
        measured = math.sqrt(error / square) if square else 0.0
        return {"text": dataclasses.replace(self.text_info, error=measured, cut=int(sums.get("cut", 0)))}

    def copy_vae(self, folder: Path) -> None:
        """Writes the autoencoder as diffusers does: `open_models` reads it, and its bytes are always the same."""
        params = {path: np.asarray(value) for path, value in flat_paths(self.vae_codec.params).items()}
        write_component(folder, "vae", self.vae_codec.model.config, params, lambda size: None)

    def text_fields(
        self, captions: Sequence[str], txt_BMT: Any, vec_BV: Any
    ) -> Iterator[tuple[dict[str, Any], dict[str, float]]]:
        """The fields and sums of each caption's states.

        Raises:
          DataError: states are not finite.
        """
        txt_BMT, vec_BV = np.asarray(txt_BMT, np.float32), np.asarray(vec_BV, np.float32)
        tokens = self.text.t5_tokens(captions, self.text_info.tokens)
        for i, caption in enumerate(captions):
            if not (np.isfinite(txt_BMT[i]).all() and np.isfinite(vec_BV[i]).all()):
                raise DataError(f"the text states of {caption[:60]!r} are not finite: the checkpoint is damaged")
            fields, error, square = pack_text(txt_BMT[i], self.text_info, int(tokens.length_B[i]))
            sums = {"error_square": error, "state_square": square, "cut": float(bool(tokens.cuts[i]))}
            yield fields | {"vec": vec_BV[i]}, sums


def _open_encoders(checkpoint: str | Path, states: str, why: str) -> tuple[TextEncoders, VaeCodec, int]:
    """Text encoders and autoencoder of a converted pipeline on this process's devices, and how many those are.

    Raises:
      ConvertedError: a model is missing, or cannot be read.
    """
    mesh, dtype = local_mesh()
    parts = open_pipeline(Path(checkpoint).expanduser(), ("vae", "t5", "clip"), why)
    parts = parts._replace(models={kind: on_mesh(model, mesh, dtype) for kind, model in parts.models.items()})
    return TextEncoders(parts, mesh, states), VaeCodec(parts.models["vae"], mesh), mesh.devices.size


class CaptionEncoder(SetMaker):
    """Unit -> its records: captions with their text states, and no images.

    The autoencoder lies beside them, for what is sampled on them is to be seen.

    Attributes:
      units: each of so many captions.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        captions: Sequence[str],
        states: str = "full",
        text_tokens: int = 256,
        text_dtype: str = "bfloat16",
        per_device: int = 8,
        unit: int = 4096,
    ):
        """Opens a converted pipeline; the arguments are those of `LatentEncoder`, and captions a unit."""
        text, vae_codec, devices = _open_encoders(checkpoint, states, "captions need")
        super().__init__(text, vae_codec, text_tokens, text_dtype, per_device * devices)
        self._captions, self._unit = captions, unit
        starts = range(0, len(captions), unit)
        self.units = [
            Unit(i, f"captions {first} to {min(first + unit, len(captions)) - 1}", min(unit, len(captions) - first))
            for i, first in enumerate(starts)
        ]

    def __call__(self, unit: Unit) -> Iterator[Record]:
        """The records of a unit. Raises DataError where states are not finite."""
        start = unit.index * self._unit
        for first in range(start, min(start + self._unit, len(self._captions)), self.batch_size):
            chunk = self._captions[first : min(first + self.batch_size, start + self._unit)]
            encoded = self.text.encode(padded(chunk, self.batch_size), self.text_info.tokens)
            texts = self.text_fields(chunk, *(x[: len(chunk)] for x in encoded))
            for i, (caption, (fields, sums)) in enumerate(zip(chunk, texts, strict=True), start=first):
                yield Record(0, {"key": f"{i:08d}", "caption": caption, **fields}, sums)


class LatentEncoder(SetMaker):
    """Captioned images to latents and text states, on all devices of this process: an `Encode`.

    The same images in the same batches give the same bytes.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        states: str = "full",
        text_tokens: int = 256,
        text_dtype: str = "bfloat16",
        per_device: int = 8,
    ):
        """Opens a converted pipeline; weights are read on first use.

        Args:
          checkpoint: a converted folder with autoencoder, T5, CLIP and tokenizers.
          states: `full` or `trimmed`.
          text_tokens: M.
          text_dtype: a key of `TEXT_DTYPES`.
          per_device: images that a device encodes at once.

        Raises:
          ConvertedError: a model is missing, or cannot be read.
        """
        text, vae_codec, devices = _open_encoders(checkpoint, states, "latents need")
        super().__init__(text, vae_codec, text_tokens, text_dtype, per_device * devices)

    def __call__(self, images: Sequence[Cropped]) -> list[tuple[dict[str, Any], dict[str, float]]]:
        """See `Encode`. Raises DataError where latents or states are not finite as they are stored."""
        rows = padded(images, self.batch_size)
        moments = self.vae_codec.encode(np.stack([p.pixels for p in rows]))
        encoded = self.text.encode([p.caption for p in rows], self.text_info.tokens)
        mean_BhwC, std_BhwC = np.asarray(moments.mean_BhwC), np.exp(0.5 * np.asarray(moments.logvar_BhwC))
        texts = self.text_fields([p.caption for p in images], *(x[: len(images)] for x in encoded))
        result = []
        for image, mean, std, (fields, sums) in zip(images, mean_BhwC, std_BhwC, texts, strict=False):
            gaussian = {"mean": as_half(mean, image.key), "std": as_half(std, image.key)}
            result.append((gaussian | fields, sums))
        return result


def padded(rows: Sequence[Any], size: int) -> list[Any]:
    """Rows and the last one again, `size` of them."""
    return [*rows, *[rows[-1]] * (size - len(rows))]


def as_half(x: np.ndarray, key: str) -> np.ndarray:
    """float16, as latents are stored. Raises DataError where a value is not finite in it."""
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    if not np.isfinite(half).all():
        raise DataError(
            f"the latents of {key} are not finite in float16 (up to {np.abs(x).max():g}): the autoencoder is damaged, "
            f"or of another kind"
        )
    return half


def check_sizes(buckets: Sequence[Size], stride: int) -> None:
    """Raises DataError where a bucket is no multiple of what a token spans: two latents each way."""
    unit = PATCH * stride
    for h, w in buckets:
        if h % unit or w % unit:
            nearest = "x".join(str(max(round(side / unit), 1) * unit) for side in (h, w))
            raise DataError(f"--buckets: {h}x{w} is not in multiples of {unit}; the nearest is {nearest}")
