"""A set that a checkpoint makes itself: prompts are sampled, and the latents that come out are stored."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shortcut_jax.core.fingerprint import fingerprint
from shortcut_jax.data.format import Size
from shortcut_jax.errors import UsageError
from shortcut_jax.inference.converted_pipeline import TextToImage
from shortcut_jax.inference.request import SampleRequest
from shortcut_jax.preparation.latents import SetMaker, as_half, padded
from shortcut_jax.preparation.units import Record, Unit
from shortcut_jax.preparation.writing import captions_hash


@dataclass(frozen=True)
class TeacherSettings:
    """What is sampled, and how.

    Attributes:
      prompts: item i has prompt i modulo their number.
      buckets: sizes of the images.
      per_bucket: items of each bucket; items are numbered through all of them.
      steps: sampling steps.
      guidance: guidance scale.
      seed: of the noise: that of item i depends on it and i only.
      text_tokens: M, for sampling and in the set.
      text_dtype: a key of `TEXT_DTYPES`.
      per_device: images that a device samples at once.
      unit: items of a unit.
    """

    prompts: tuple[str, ...]
    buckets: tuple[Size, ...]
    per_bucket: int
    steps: int = 32
    guidance: float = 3.5
    seed: int = 0
    text_tokens: int = 256
    text_dtype: str = "bfloat16"
    per_device: int = 1
    unit: int = 512


class TeacherData(SetMaker):
    """Unit -> its records: latents of the teacher as `mean`, with a `std` of 0.

    Attributes:
      pipeline: the teacher, on the devices of this process.
      units: each of items of one bucket.
    """

    def __init__(self, checkpoint: str | Path, settings: TeacherSettings, loras: Sequence[tuple[str, float]] = ()):
        """Opens a converted pipeline, with adapters and their strengths; weights are read on first use.

        Raises:
          UsageError: a size, or a number out of range.
          ConversionError, ConvertedError: the pipeline or an adapter cannot be read.
        """
        s, self._settings = settings, settings
        devices = jax.local_devices()
        self.pipeline = TextToImage(Path(checkpoint).expanduser(), devices=devices, loras=loras)
        for name in ("per_bucket", "per_device", "unit"):
            if getattr(s, name) < 1:
                raise UsageError(f"--{name} is {getattr(s, name)}, but must be at least 1")
        for height, width in s.buckets:
            try:
                how: dict[str, Any] = {"height": height, "width": width, "text_tokens": s.text_tokens}
                self.pipeline.check(SampleRequest(s.prompts, steps=s.steps, guidance=s.guidance, **how))
            except ValueError as error:
                raise UsageError(str(error)) from error
        shared = self.pipeline.text, self.pipeline.vae_codec
        super().__init__(*shared, s.text_tokens, s.text_dtype, s.per_device * len(devices))
        self._spans = [
            (bucket, first, min(first + s.unit, (bucket + 1) * s.per_bucket))
            for bucket in range(len(s.buckets))
            for first in range(bucket * s.per_bucket, (bucket + 1) * s.per_bucket, s.unit)
        ]
        told = lambda bucket, first, end: "{}x{}: items {} to {}".format(*s.buckets[bucket], first, end - 1)
        self.units = [Unit(i, told(*span), span[2] - span[1]) for i, span in enumerate(self._spans)]

    @cached_property
    def encoders(self) -> dict[str, dict[str, str]]:
        """See `SetMaker`; the teacher is among them."""
        flux = {"origin": self.pipeline.models["flux"].origin, "content": fingerprint(self.pipeline.params["flux"])}
        return {**super().encoders, "flux": flux}

    def request(self) -> dict[str, Any]:
        """What determines the content of the set, but for the encoders."""
        s = self._settings
        told = {name: getattr(s, name) for name in ("per_bucket", "steps", "guidance", "seed", "unit")}
        return {"teacher_prompts": captions_hash(s.prompts), "buckets": [f"{h}x{w}" for h, w in s.buckets], **told}

    def __call__(self, unit: Unit) -> Iterator[Record]:
        """The records of a unit. Raises DataError where something is not finite as it is stored."""
        bucket, start, end = self._spans[unit.index]
        height, width = self._settings.buckets[bucket]
        for first in range(start, end, self.batch_size):
            items = range(first, min(first + self.batch_size, end))
            prompts = [self._settings.prompts[i % len(self._settings.prompts)] for i in items]
            latents_BhwC, txt_BMT, vec_BV = self._sample(first, prompts, height, width)
            texts = self.text_fields(prompts, txt_BMT, vec_BV)
            for i, prompt, z, (fields, sums) in zip(items, prompts, latents_BhwC, texts, strict=False):
                mean = as_half(z / self.latents.scale + self.latents.shift, f"item {i}")
                told = {"key": f"{i:08d}", "caption": prompt, "height": height, "width": width}
                yield Record(bucket, {**told, "mean": mean, "std": np.zeros_like(mean), **fields}, sums)

    def _sample(self, first: int, prompts: list[str], height: int, width: int) -> tuple[np.ndarray, Any, Any]:
        """Latents and text states of items, all of them for a batch of one shape."""
        s, pipeline, size = self._settings, self.pipeline, self.batch_size
        scale = pipeline.guidance(s.guidance).scale
        condition = pipeline.encode(padded(prompts, size), s.guidance, s.text_tokens)
        negative = (pipeline.encode([""] * size, s.guidance, s.text_tokens), scale) if scale != 1.0 else None
        noise_BNC = pipeline.draw_noise(s.seed, first, size, height, width)
        latents = pipeline.denoise(noise_BNC, condition, (height, width), s.steps, None, negative)
        num = len(prompts)
        return np.asarray(latents, np.float32)[:num], condition.txt_BMT[:num], condition.vec_BV[:num]
