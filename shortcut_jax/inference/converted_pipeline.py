"""Prompts to images with a converted pipeline: tokenizers, T5 and CLIP, the transformer, the autoencoder."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from shortcut_jax.config.bounds import (
    MAX_BATCH,
    MAX_IMAGES,
    MAX_SIDE,
    MAX_TOKENS,
    check_whole,
)
from shortcut_jax.core.types import Array
from shortcut_jax.errors import BoundsError
from shortcut_jax.inference.converted_editor import edit_images
from shortcut_jax.inference.converted_models import ConvertedModels
from shortcut_jax.inference.generator import draw_arrays, full_batches
from shortcut_jax.inference.image_files import Record
from shortcut_jax.inference.request import Draws, Edit, ModelLimits, Row, SampleRequest, nearest_multiple
from shortcut_jax.steps.editing import make_plan
from shortcut_jax.steps.sampling import noise_rows

SIDE = 1024
"""Pixels of a side by default."""

EDIT_OPTIONS = {"plain", "average", "source_guidance", "draws", "guidance", "shift", "text_tokens", "lora_scale"}
"""What `TextToImage.edit` takes besides its named arguments."""

EXAMPLES = (
    "a red fox in the snow, golden hour",
    "a lighthouse on a cliff, oil painting",
    "a bowl of ramen, top view, studio light",
    "an old library with a spiral staircase",
)
"""Prompts to begin with."""


class TextToImage(ConvertedModels):
    """A converted pipeline: `TextToImage("flux1-schnell")("a red fox in the snow", steps=4)`.

    It is also an `inference.request.ImagePipeline`.
    """

    def __call__(
        self,
        prompts: str | Sequence[str],
        steps: int = 4,
        guidance: float | None = None,
        height: int = SIDE,
        width: int = SIDE,
        num: int = 1,
        seed: int = 0,
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
          **options: `draws`, the (seed, number in that seed) of each image's noise, by default the i-th of `seed`; and
            of `SampleRequest`, each None for the pipeline's own: `text_tokens`, the length that prompts are padded or
            cut to for T5; `shift`, the timestep shift; `method`, `euler` or `heun`; `batch_size`, images sampled at
            once, by default one a device; `lora_scale`, a factor of the strengths of adapters that are not merged.

        Raises:
          ValueError: an argument is out of range (see `check`).
          ConvertedError: the weights cannot be read.
        """
        size: dict[str, Any] = {"height": height, "width": width, "num": num, "seed": seed}
        rows, request = self._asked(prompts, steps=steps, guidance=guidance, **size, **options)
        return self.images(rows, request)

    def trajectory(self, prompts: str | Sequence[str], steps: int = 4, **options: Any) -> np.ndarray:
        """The images that each step aims at, and the result: [images, steps + 1, height, width, 3], uint8.

        Arguments and errors are those of a call; see `core.flow.predictions`.
        """
        return self.trajectories(*self._asked(prompts, steps=steps, **options))

    def edit(
        self,
        images_BhwC: np.ndarray,
        source_prompt: str,
        prompt: str,
        steps: int = 4,
        skip: int = 0,
        **options: Any,
    ) -> np.ndarray:
        """Images of what `source_prompt` says, changed to what `prompt` says, uint8; see `steps.editing`.

        Args:
          images_BhwC: uint8 [B, height, width, 3], all sampled at once.
          source_prompt: of all of them.
          prompt: of all of them.
          steps: of the grid.
          skip: first steps that are left out.
          **options: `plain`, `average` and `source_guidance` of `Edit`; `draws`, `guidance`, `shift`, `text_tokens` and
            `lora_scale` as in a call.

        Raises:
          ValueError: numbers or a size out of range.
          ConvertedError: the weights cannot be read.
        """
        num, height, width = images_BhwC.shape[:3]
        check_whole("images", num, MAX_IMAGES)
        if unknown := options.keys() - EDIT_OPTIONS:
            raise TypeError(f"an edit takes no {', '.join(sorted(unknown))}, but {', '.join(sorted(EDIT_OPTIONS))}")
        own = {name: options.pop(name) for name in ("plain", "average", "source_guidance") if name in options}
        change = Edit(images_BhwC[0], source_prompt, skip, **own)
        size: dict[str, Any] = {"height": height, "width": width, "num": num}
        rows, request = self._asked(prompt, steps=steps, edit=change, **size, **options)
        return edit_images(self, images_BhwC, rows, request, self._flux(None, request))

    def _asked(
        self, prompts: str | Sequence[str], draws: Draws | None = None, **options: Any
    ) -> tuple[list[Row], SampleRequest]:
        """What is asked of a call, checked; what is cut off its prompts is printed once."""
        request = SampleRequest((prompts,) if isinstance(prompts, str) else tuple(prompts), **options)
        check_whole("prompts", len(request.prompts), MAX_IMAGES)
        self.check(request)
        rows = request.rows_of(draws)
        self.tell(request)
        return rows, request

    # What follows is `ImagePipeline`.

    @property
    def limits(self) -> ModelLimits:
        """See `ImagePipeline`."""
        beside: list[str] = [Path(path).name for path, _ in self.loras] if self.adapters is not None else []
        facts = (self.computed, *(f"LoRA {name}" for name in beside))
        limits = ModelLimits(self.name, facts, SIDE, SIDE, any_size=True, size_unit=self.size_unit)
        return limits._replace(guidance=self.guidance(), adapters=bool(beside), examples=EXAMPLES)

    def rounded(self, batch_size: int | None) -> int:
        """See `ImagePipeline`; one image a device by default."""
        devices = self.mesh.devices.size
        size = 1 if batch_size is None else check_whole("batch_size", batch_size, MAX_BATCH)
        return -(-size // devices) * devices

    def check(self, request: SampleRequest) -> None:
        """Checks a request without reading weights.

        Raises:
          ValueError: a size that is no multiple of twice a latent's, or a number out of range.
        """
        request.check("")
        check_whole("prompts", len(request.prompts), MAX_IMAGES, 0)
        height, width = self._size(request)
        for name, side in {"height": height, "width": width}.items():
            check_whole(name, side, MAX_SIDE, -MAX_SIDE)
        unit = self.size_unit
        if height < unit or width < unit or height % unit or width % unit:
            nearest = " x ".join(str(nearest_multiple(side, unit)) for side in (height, width))
            raise BoundsError(
                f"height x width is {height} x {width}, but both must be multiples of {unit}: the nearest is {nearest}"
            )
        if request.text_tokens is not None:
            check_whole("text_tokens", request.text_tokens, MAX_TOKENS)
        if request.guidance is not None and request.guidance < 0:
            raise BoundsError(f"guidance is {request.guidance:g}, but must not be negative")
        if request.lora_scale is not None and self.adapters is None:
            raise BoundsError("lora_scale is for adapters that are not merged: give their strengths with the adapters")
        if request.edit is not None:
            make_plan(request.steps, **request.edit.plan)

    def notes(self, request: SampleRequest) -> list[str]:
        """See `ImagePipeline`."""
        guidance = f"{self.guidance(request.guidance)}; {self.computed}"
        return [guidance, *self.prompt_notes(request)]

    def prompt_notes(self, request: SampleRequest) -> list[str]:
        """A line for each prompt and text encoder that does not read all of it, with the text that is cut off."""
        return self.text.cuts(list(dict.fromkeys(request.texts)), request.text_tokens)

    def tell(self, request: SampleRequest) -> None:
        """Prints each of the `prompt_notes` once."""
        self.say_once(self.prompt_notes(request))

    def weights(self, view: str | None = None) -> Any:
        """See `ImagePipeline`; there is one set."""
        del view
        return self.params

    def images(self, rows: Sequence[Row], request: SampleRequest, weights: Any = None) -> np.ndarray:
        """See `ImagePipeline`."""
        if request.edit is not None:
            images_BhwC = np.stack([request.edit.pixels_hwc] * len(rows))
            return edit_images(self, images_BhwC, rows, request, self._flux(weights, request))
        return np.concatenate([self.to_images(x)[:n] for x, n in self._batches(rows, request, weights)])

    def trajectories(self, rows: Sequence[Row], request: SampleRequest, weights: Any = None) -> np.ndarray:
        """See `ImagePipeline`."""
        parts = []
        for kept, num in self._batches(rows, request, weights, trajectory=True):
            along = kept[: request.steps + 1, :num]
            parts.append(np.stack([self.to_images(latents) for latents in along], axis=1))
        return np.concatenate(parts)

    def _batches(
        self, rows: Sequence[Row], request: SampleRequest, weights: Any, trajectory: bool = False
    ) -> Iterator[tuple[Array, int]]:
        """Latents of each batch, and how many of its rows are asked for."""
        size, batch, flux = self._size(request), self.rounded(request.batch_size), self._flux(weights, request)
        encode = partial(self.encode, guidance=request.guidance, text_tokens=request.text_tokens)
        scale = self.guidance(request.guidance).scale
        negative = (encode([""] * batch), scale) if scale != 1.0 else None
        how: dict[str, Any] = {"method": request.method, "trajectory": trajectory, "flux": flux}
        for chosen, new in full_batches(len(rows), batch):
            condition = encode([rows[i].prompt for i in chosen])
            numbers = draw_arrays([row.draw for row in rows], chosen)
            noise_BNC = noise_rows(*numbers, self.models["flux"].config, *self.latent_size(*size))
            yield self.denoise(noise_BNC, condition, size, request.steps, request.shift, negative, **how), new

    def _flux(self, weights: Any, request: SampleRequest) -> Any:
        """The transformer's weights, with the strength of adapters that is asked for."""
        flux = (self.params if weights is None else weights)["flux"]
        return flux if request.lora_scale is None else flux._replace(scale=jnp.float32(request.lora_scale))

    def image_size(self, height: int, width: int, request: SampleRequest) -> tuple[int, int, int]:
        """See `ImagePipeline`: the size that is asked for, or that of the image, at most about a megapixel."""
        if request.height and request.width:
            return request.height, request.width, 3
        scale, unit = min(1.0, SIDE / math.sqrt(height * width)), self.size_unit
        rows, columns = (nearest_multiple(side * scale, unit) for side in (height, width))
        return rows, columns, 3

    def facts(self, request: SampleRequest) -> Record:
        """See `ImagePipeline`."""
        height, width = self._size(request)
        shift = self.shift_at(height, width) if request.shift is None else request.shift
        made: Record = {"guidance": self.guidance(request.guidance).value, "shift": shift}
        made |= {"height": height, "width": width, "text_tokens": request.text_tokens, "model": self.name}
        made |= {"matmul_dtype": self.matmul_dtype} if self.matmul_dtype else {}
        strength = 1.0 if request.lora_scale is None else request.lora_scale
        return made | {"lora": [[Path(path).name, scale * strength] for path, scale in self.loras]}

    def title(self, request: SampleRequest) -> str:
        """See `ImagePipeline`."""
        return "{} x {}".format(*self._size(request))

    def _size(self, request: SampleRequest) -> tuple[int, int]:
        """Rows and columns of its images in pixels."""
        height, width = request.height, request.width
        return SIDE if height is None else height, SIDE if width is None else width
