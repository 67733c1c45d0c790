"""What a checkpoint is, told from its names and shapes alone: which models, by which table, of which geometry."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from shortcut_jax.errors import ConversionError
from shortcut_jax.formats.detect_encoders import (
    Found,
    Shapes,
    count_blocks,
    dims,
    find_clip,
    find_clip_pair,
    find_inception,
    find_t5,
    find_vae,
)
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.weights import flux_bfl, flux_diffusers
from shortcut_jax.weights.entries import FLAG, LIST, WHOLE, told
from shortcut_jax.weights.foreign import refuse_adapters, refuse_models
from shortcut_jax.weights.lora_names import is_lora

ROTARY_AXES = {128: (16, 56, 56), 64: (8, 28, 28)}
"""Rotary axes by head size, where no config tells them."""

OTHER_CHANNELS = {
    384: "FLUX.1 Fill (latents, masked image and mask)",
    128: "FLUX.1 Canny or Depth (latents and a control image)",
}
"""Relatives of Flux by the width of their image input."""


TOLD: dict[str, dict[str, tuple[str, Callable[[Any], Any]]]] = {
    "flux": {
        "num_layers": (WHOLE, lambda c: c.double_blocks),
        "num_single_layers": (WHOLE, lambda c: c.single_blocks),
        "guidance_embeds": (FLAG, lambda c: c.guidance),
        "num_attention_heads": (WHOLE, lambda c: c.heads),
        "attention_head_dim": (WHOLE, lambda c: c.head_size),
        "in_channels": (WHOLE, lambda c: c.channels),
    },
    "vae": {
        "block_out_channels": (LIST, lambda c: c.widths),
        "layers_per_block": (WHOLE, lambda c: c.level_blocks),
    },
    "t5": {
        "num_layers": (WHOLE, lambda c: c.blocks),
        "num_heads": (WHOLE, lambda c: c.heads),
        "d_kv": (WHOLE, lambda c: c.head_size),
    },
    "clip": {
        "num_hidden_layers": (WHOLE, lambda c: c.blocks),
        "num_attention_heads": (WHOLE, lambda c: c.heads),
    },
    "clip_score": {"projection_dim": (WHOLE, lambda c: c.joint)},
    "inception": {},
}
"""What a config.json says that shapes say too, by kind: what is missing at an end of a model is seen by it alone."""

_OWNERS = {
    "FluxTransformer2DModel": "flux",
    "AutoencoderKL": "vae",
    "t5": "t5",
    "clip_text_model": "clip",
    "clip": "clip_score",
}
"""Whose a config.json is, by its `_class_name` or `model_type`."""


def identify(shapes: Shapes, hints: Mapping[str, Any] | None = None) -> list[Found]:
    """Every model found among the names, the transformer first.

    Args:
      shapes: shapes by name.
      hints: entries of the checkpoint's own config.json; only what shapes cannot tell is read from it.

    Raises:
      ConversionError: nothing is recognised, or a relative of Flux that is not supported.
    """
    refuse_models(shapes)
    found: list[Found] = []
    for sign, make in _SIGNS:
        pairs = [f.prefix for f in found if f.kind == "clip_score"]
        prefixes = [name.removesuffix(sign) for name in shapes if name.endswith(sign)]
        prefixes = [p for p in prefixes if make is not find_clip or p not in pairs]
        if prefixes:
            if len(prefixes) > 1:
                raise ConversionError(f"several models of one kind are here, under {', '.join(sorted(prefixes))}")
            (prefix,) = prefixes
            own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
            found.append(make(prefix, own, hints or {}))
    _check_told(found, hints or {})
    if not found:
        if is_lora(shapes):
            refuse_adapters(shapes)
            raise ConversionError("these are adapters (a LoRA), not a model: name them by --lora, and their base here")
        _check_signs(shapes)
        examples = ", ".join(sorted(shapes)[:3]) or "nothing"
        raise ConversionError(
            f"this is not a Flux transformer, its autoencoder, a T5 encoder, a CLIP text tower, a whole CLIP or the "
            f"InceptionV3 of FID: it holds {examples}"
        )
    return found


def _check_told(found: list[Found], hints: Mapping[str, Any]) -> None:
    """Refuses models that are not what the config beside them says; a name that fits two of them tells of neither."""
    named = str(hints.get("_class_name") or hints.get("model_type"))
    kinds = Counter(name for f in found for name in TOLD[f.kind])
    for f in found:
        if _OWNERS.get(named, f.kind) != f.kind:
            continue  # the config of a neighbour
        for name, (kind, read) in TOLD[f.kind].items():
            said, held = told(hints, name, kind), read(f.config)
            if said is not None and kinds[name] == 1 and said != held:
                raise ConversionError(
                    f"config.json says {name} {said!r}, but the checkpoint holds {held!r}: it is incomplete, or the "
                    f"config is another model's"
                )


def _check_signs(shapes: Shapes) -> None:
    """Tells of a model that is there but for the very name it is known by."""
    for sign, _ in _SIGNS:
        stem = re.split(r"\.0\.|\.attn|\.embeddings|\.conv\.", sign)[0] + "."
        if any(name.startswith(stem) or f".{stem}" in name for name in shapes):
            dims(shapes, sign, 0)


def _flux(
    layout: str, image_in: str, image_out: str, norm: str, stacks: tuple[str, str], names: tuple[str, str, str]
) -> Callable:
    text_in, pooled_in, guidance_in = names
    rules = flux_bfl.RULES if layout == "bfl" else flux_diffusers.RULES

    def make(prefix: str, shapes: Shapes, hints: Mapping[str, Any]) -> Found:
        width, channels = dims(shapes, image_in, 2)
        (head_size,) = dims(shapes, norm, 1)
        if channels in OTHER_CHANNELS:
            raise ConversionError(
                f"this is {OTHER_CHANNELS[channels]}, which is not supported: use FLUX.1 dev or schnell"
            )
        outputs = dims(shapes, image_out, 2)[0]
        if channels != outputs:
            raise ConversionError(
                f"{image_in} reads {channels} channels, but the model gives {outputs}: this is a relative of Flux with "
                f"further inputs, which is not supported: use FLUX.1 dev or schnell"
            )
        if width % head_size:
            raise ConversionError(f"the width {width} of {image_in} is no multiple of the head size {head_size}")
        axes: tuple[int, ...] = told(hints, "axes_dims_rope", LIST, ROTARY_AXES.get(head_size, ()))
        if sum(axes) != head_size or any(axis <= 0 or axis % 2 for axis in axes):
            misfit = f", and {axes} do not fit it (even numbers that add up to it)" if axes else ""
            raise ConversionError(
                f"the rotary axes of head size {head_size} are not known{misfit}: name them as axes_dims_rope in a "
                f"config.json beside the weights"
            )
        config = FluxConfig(
            double_blocks=count_blocks(shapes, stacks[0]),
            single_blocks=count_blocks(shapes, stacks[1]),
            width=width,
            heads=width // head_size,
            axes=axes,
            channels=channels,
            text_width=dims(shapes, text_in, 2)[1],
            pooled_width=dims(shapes, pooled_in, 2)[1],
            guidance=guidance_in in shapes,
        )
        return Found("flux", layout, prefix, config, rules)

    return make


_SIGNS: tuple[tuple[str, Callable[[str, Shapes, Mapping[str, Any]], Found]], ...] = (
    (
        "double_blocks.0.img_attn.qkv.weight",
        _flux(
            "bfl",
            "img_in.weight",
            "final_layer.linear.weight",
            "double_blocks.0.img_attn.norm.query_norm.scale",
            ("double_blocks", "single_blocks"),
            ("txt_in.weight", "vector_in.in_layer.weight", "guidance_in.in_layer.weight"),
        ),
    ),
    (
        "transformer_blocks.0.attn.add_q_proj.weight",
        _flux(
            "diffusers",
            "x_embedder.weight",
            "proj_out.weight",
            "transformer_blocks.0.attn.norm_q.weight",
            ("transformer_blocks", "single_transformer_blocks"),
            (
                "context_embedder.weight",
                "time_text_embed.text_embedder.linear_1.weight",
                "time_text_embed.guidance_embedder.linear_1.weight",
            ),
        ),
    ),
    ("encoder.mid.attn_1.q.weight", find_vae("bfl")),
    ("encoder.mid_block.attentions.0.to_q.weight", find_vae("diffusers")),
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", find_t5),
    ("vision_model.embeddings.class_embedding", find_clip_pair),
    ("text_model.embeddings.token_embedding.weight", find_clip),
    ("Mixed_5b.branch1x1.conv.weight", find_inception),
)
"""A name that only one kind of model has, and how its geometry is read."""
