"""FlowEdit with a converted pipeline: images through its autoencoder, edited, and back."""

from collections.abc import Callable
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from shortcut_jax.core.latents import PATCH
from shortcut_jax.core.schedules import Spacing
from shortcut_jax.core.types import Array
from shortcut_jax.inference.encoders import split_rows
from shortcut_jax.inference.generator import Draws, bound_of, draw_arrays, numbered
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.steps.editing import make_editor, make_plan

if TYPE_CHECKING:
    from shortcut_jax.inference.converted_pipeline import TextToImage


class Editor:
    """`TextToImage("flux1-dev").edit(images, "a cat on a chair", "a dog on a chair", steps=28, skip=4)`."""

    def __init__(self, pipeline: "TextToImage"):
        """Takes the pipeline whose models it edits with."""
        self._pipeline = pipeline

    def __call__(
        self,
        images_BhwC: np.ndarray,
        source_prompt: str,
        prompt: str,
        steps: int = 4,
        skip: int = 0,
        plain: int = 0,
        average: int = 1,
        *,
        guidance: float | None = None,
        source_guidance: float | None = None,
        draws: Draws | None = None,
        shift: float | None = None,
        text_tokens: int | None = None,
        quiet: bool = False,
    ) -> np.ndarray:
        """Images of what `source_prompt` says, changed to what `prompt` says, uint8; see `steps.editing`.

        Args:
          images_BhwC: uint8 [B, height, width, 3], all sampled at once.
          source_prompt: of all of them.
          prompt: of all of them.
          steps: of the grid.
          skip: first steps that are left out.
          plain: last steps that only follow the target.
          average: noises a step.
          guidance: scale for the target, as in a call of the pipeline.
          source_guidance: scale for the source; that of the target by default.
          draws: noise of each image; by default the i-th of seed 0.
          shift: as in a call of the pipeline.
          text_tokens: as in a call of the pipeline.
          quiet: as in a call of the pipeline.

        Raises:
          ValueError: numbers or a size out of range.
          ConvertedError: the weights cannot be read.
        """
        ours, (num, height, width) = self._pipeline, images_BhwC.shape[:3]
        plan = make_plan(steps, skip, plain, average)
        ours.check([source_prompt, prompt], steps, guidance, height, width, num, text_tokens, shift)
        ours.tell([source_prompt, prompt], text_tokens, quiet)
        size = ours.latent_size(height, width)
        shift = ours.sampling.shift.at(size[0] * size[1] // PATCH**2) if shift is None else shift
        pairs = [(source_prompt, guidance if source_guidance is None else source_guidance), (prompt, guidance)]
        source, target = (ours.encode([text] * num, scale, text_tokens) for text, scale in pairs)
        scales = [ours.guidance(scale).scale for _, scale in pairs]
        negative = None if scales == [1.0, 1.0] else ours.encode([""] * num, guidance, text_tokens)
        numbers = draw_arrays(numbered(draws, 0, num), np.arange(num))
        split = partial(jax.tree.map, partial(split_rows, ours.mesh))
        rows = split((ours.vae_codec.latents(images_BhwC), *numbers, source, target))
        with jax.set_mesh(ours.mesh):
            args = (ours.params["flux"], float(shift), *rows, plan, split(negative), *map(float, scales))
            latents = self._edit(*args, size=size, bound=bound_of(steps))
        return ours.images(latents)[:num]

    @cached_property
    def _edit(self) -> Callable[..., Array]:
        return _edit_program(self._pipeline.models["flux"].config, self._pipeline.sampling.spacing)


@lru_cache(maxsize=16)
def _edit_program(cfg: FluxConfig, spacing: Spacing) -> Callable[..., Array]:
    """Compiled once for each size, number of images and bound of the step count."""

    @partial(jax.jit, static_argnames=("size", "bound"))
    def edit(params: Any, shift: Array, *rest: Any, size: tuple[int, int], bound: int) -> Array:
        return make_editor(cfg, *size, bound, shift, bound, spacing)(params, *rest)

    return edit
