"""FlowEdit with a converted pipeline: images through its autoencoder, edited, and back."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np

from shortcut_jax.core.schedules import Spacing
from shortcut_jax.core.types import Array
from shortcut_jax.inference.converted_models import ConvertedModels
from shortcut_jax.inference.encoders import split_rows
from shortcut_jax.inference.generator import bound_of, draw_arrays
from shortcut_jax.inference.request import Row, SampleRequest
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.steps.editing import make_editor, make_plan


def edit_images(
    pipeline: ConvertedModels, images_BhwC: np.ndarray, rows: Sequence[Row], request: SampleRequest, flux: Any
) -> np.ndarray:
    """Images of what `request.edit` says, uint8 [B, height, width, 3], changed to what their rows say, all at once.

    `flux` are the transformer's weights. Raises ConvertedError where images are not finite.
    """
    edit, num, size = request.edit, len(rows), images_BhwC.shape[1:3]
    assert edit is not None
    scale = request.guidance if edit.source_guidance is None else edit.source_guidance
    encode = partial(pipeline.encode, text_tokens=request.text_tokens)
    source = encode([edit.source_prompt] * num, scale)
    target = encode([row.prompt for row in rows], request.guidance)
    scales = tuple(float(pipeline.guidance(s).scale) for s in (scale, request.guidance))
    empty = None if scales == (1.0, 1.0) else encode([""] * num, request.guidance)
    draws = draw_arrays([row.draw for row in rows], np.arange(num))
    parts = jax.tree.map(
        partial(split_rows, pipeline.mesh), (pipeline.vae_codec.latents(images_BhwC), draws, source, target, empty)
    )
    *parts, empty = parts
    shift = pipeline.shift_at(*size) if request.shift is None else request.shift
    plan = make_plan(request.steps, **edit.plan)
    edited = edit_program(pipeline.models["flux"].config, pipeline.spacing)
    with jax.set_mesh(pipeline.mesh):
        args = (flux, float(shift), *parts, plan, empty, scales)
        latents = edited(*args, size=pipeline.latent_size(*size), bound=bound_of(request.steps))
    return pipeline.to_images(latents)[:num]


@lru_cache(maxsize=16)
def edit_program(cfg: FluxConfig, spacing: Spacing) -> Callable[..., Array]:
    """Compiled once for each size, number of images and bound of the step count."""

    @partial(jax.jit, static_argnames=("size", "bound"))
    def edit(params: Any, shift: Array, *rest: Any, size: tuple[int, int], bound: int) -> Array:
        return make_editor(cfg, size, bound, shift, bound, spacing)(params, *rest)

    return edit
