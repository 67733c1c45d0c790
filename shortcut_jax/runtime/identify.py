"""What a checkpoint is, told from its names and shapes alone: which models, by which table, of which geometry."""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from shortcut_jax.models.clip import ClipConfig
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.models.t5 import T5Config
from shortcut_jax.models.vae import VaeConfig
from shortcut_jax.weights import flux_bfl, flux_diffusers, text, vae
from shortcut_jax.weights.entries import FLAG, LIST, NUMBER, WHOLE, told
from shortcut_jax.weights.rules import ConversionError, Rule

Shapes = Mapping[str, tuple[int, ...]]

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
}
"""What a config.json says that shapes say too, by kind: what is missing at an end of a model is seen by it alone."""

_OWNERS = {"FluxTransformer2DModel": "flux", "AutoencoderKL": "vae", "t5": "t5", "clip_text_model": "clip"}
"""Whose a config.json is, by its `_class_name` or `model_type`."""


class Found(NamedTuple):
    """One model in a checkpoint.

    Attributes:
      kind: `flux`, `vae`, `t5` or `clip`.
      layout: whose names: `bfl`, `diffusers` or `transformers`.
      prefix: what stands before each of its names.
      config: its geometry.
      rules: its table.
    """

    kind: str
    layout: str
    prefix: str
    config: Any
    rules: tuple[Rule, ...]

    def __str__(self) -> str:
        where = f", under {self.prefix}" if self.prefix else ""
        return f"{describe(self)} in the layout of {self.layout}{where}"


def identify(shapes: Shapes, hints: Mapping[str, Any] | None = None) -> list[Found]:
    """Every model found among the names, the transformer first.

    Args:
      shapes: shapes by name.
      hints: entries of the checkpoint's own config.json; only what shapes cannot tell is read from it.

    Raises:
      ConversionError: nothing is recognised, or a relative of Flux that is not supported.
    """
    found = []
    for sign, make in _SIGNS:
        prefixes = [name.removesuffix(sign) for name in shapes if name.endswith(sign)]
        if prefixes:
            if len(prefixes) > 1:
                raise ConversionError(f"several models of one kind are here, under {', '.join(sorted(prefixes))}")
            (prefix,) = prefixes
            own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
            found.append(make(prefix, own, hints or {}))
    _check_told(found, hints or {})
    if not found:
        _check_signs(shapes)
        examples = ", ".join(sorted(shapes)[:3]) or "nothing"
        raise ConversionError(
            f"this is not a Flux transformer, its autoencoder, a T5 encoder or a CLIP text tower: it holds {examples}"
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
        stem = re.split(r"\.0\.|\.attn|\.embeddings", sign)[0] + "."
        if any(name.startswith(stem) or f".{stem}" in name for name in shapes):
            _dims(shapes, sign, 0)


def describe(found: Found) -> str:
    """A model in words: `FLUX.1 transformer with guidance, 19 + 38 blocks of width 3072`."""
    c = found.config
    if found.kind == "flux":
        guidance = "with" if c.guidance else "without"
        return f"Flux transformer {guidance} guidance, {c.double_blocks} + {c.single_blocks} blocks of width {c.width}"
    if found.kind == "vae":
        return f"autoencoder with {c.latent_channels} latent channels"
    name = "T5 encoder" if found.kind == "t5" else "CLIP text tower"
    return f"{name}, {c.blocks} blocks of width {c.width}"


def _count(shapes: Shapes, stack: str) -> int:
    """Blocks of a stack whose names begin with `stack.NUMBER.`: the depth at which the fewest names are wrong.

    A block that is absent between others is thus missing, while a stray number beyond them is left over.
    """
    places = [n.split(".")[stack.count(".") + 1] for n in shapes if n.startswith(f"{stack}.")]
    sizes = Counter(int(p) for p in places if p.isdigit())
    whole = max(sizes.values(), default=0)

    def wrong(depth: int) -> int:
        inside = sum(size for i, size in sizes.items() if i < depth)
        return (whole * depth - inside) + (sizes.total() - inside)

    return min((0, *(i + 1 for i in sizes)), key=lambda depth: (wrong(depth), -depth))


def _same(hints: Mapping[str, Any], name: str, value: Any) -> None:
    """Refuses a config that asks for another function than the one that is built."""
    if hints.get(name, value) != value:
        raise ConversionError(f"config.json says {name} {hints[name]!r}, but only {value!r} is supported")


def _dims(shapes: Shapes, name: str, count: int) -> tuple[int, ...]:
    """The shape of a tensor from which a geometry is read.

    Raises:
      ConversionError: it is missing, or has another number of axes.
    """
    if name not in shapes:
        nearest = difflib.get_close_matches(name, list(shapes), n=1)
        hint = f" (nearest known name: {nearest[0]})" if nearest else ""
        raise ConversionError(f"missing from the checkpoint: {name}{hint}")
    if len(shapes[name]) != count or 0 in shapes[name]:
        raise ConversionError(f"{name} has shape {shapes[name]}, but should have {count} axes, none of them 0")
    return tuple(shapes[name])


def _flux(
    layout: str, image_in: str, image_out: str, norm: str, stacks: tuple[str, str], names: tuple[str, str, str]
) -> Callable:
    text_in, pooled_in, guidance_in = names
    rules = flux_bfl.RULES if layout == "bfl" else flux_diffusers.RULES

    def make(prefix: str, shapes: Shapes, hints: Mapping[str, Any]) -> Found:
        width, channels = _dims(shapes, image_in, 2)
        (head_size,) = _dims(shapes, norm, 1)
        if channels in OTHER_CHANNELS:
            raise ConversionError(
                f"this is {OTHER_CHANNELS[channels]}, which is not supported: use FLUX.1 dev or schnell"
            )
        outputs = _dims(shapes, image_out, 2)[0]
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
            double_blocks=_count(shapes, stacks[0]),
            single_blocks=_count(shapes, stacks[1]),
            width=width,
            heads=width // head_size,
            axes=axes,
            channels=channels,
            text_width=_dims(shapes, text_in, 2)[1],
            pooled_width=_dims(shapes, pooled_in, 2)[1],
            guidance=guidance_in in shapes,
        )
        return Found("flux", layout, prefix, config, rules)

    return make


def _vae(layout: str) -> Callable:
    def make(prefix: str, shapes: Shapes, hints: Mapping[str, Any]) -> Found:
        stack = "encoder.down" if layout == "bfl" else "encoder.down_blocks"
        conv = f"{stack}.{{}}.block.0.conv1.weight" if layout == "bfl" else f"{stack}.{{}}.resnets.0.conv1.weight"
        levels = _count(shapes, stack)
        inside = conv.format(0).rsplit(".0.conv1", 1)[0]
        default = VaeConfig()
        config = VaeConfig(
            channels=_dims(shapes, "encoder.conv_in.weight", 4)[1],
            latent_channels=_dims(shapes, "decoder.conv_in.weight", 4)[1],
            widths=tuple(_dims(shapes, conv.format(i), 4)[0] for i in range(levels)),
            level_blocks=_count(shapes, inside),
            groups=told(hints, "norm_num_groups", WHOLE, default.groups),
            scale=told(hints, "scaling_factor", NUMBER, default.scale),
            shift=told(hints, "shift_factor", NUMBER, default.shift),
        )
        if config.groups < 1 or any(width % config.groups for width in config.widths):
            raise ConversionError(
                f"{config.groups} groups of norms do not divide the widths {config.widths}: name norm_num_groups in a "
                f"config.json beside the weights"
            )
        table = vae.bfl_rules if layout == "bfl" else vae.diffusers_rules
        return Found("vae", layout, prefix, config, table(levels, config.level_blocks))

    return make


def _t5(prefix: str, shapes: Shapes, hints: Mapping[str, Any]) -> Found:
    block = "encoder.block.0.layer"
    _same(hints, "feed_forward_proj", "gated-gelu")
    _same(hints, "layer_norm_epsilon", 1e-6)
    buckets, heads = _dims(shapes, f"{block}.0.SelfAttention.relative_attention_bias.weight", 2)
    inner, width = _dims(shapes, f"{block}.0.SelfAttention.q.weight", 2)
    if inner % heads:
        raise ConversionError(f"the {inner} outputs of {block}.0.SelfAttention.q do not divide into {heads} heads")
    config = T5Config(
        vocab=_dims(shapes, "shared.weight", 2)[0],
        width=width,
        blocks=_count(shapes, "encoder.block"),
        heads=heads,
        head_size=inner // heads,
        hidden=_dims(shapes, f"{block}.1.DenseReluDense.wi_0.weight", 2)[0],
        buckets=buckets,
        max_distance=told(hints, "relative_attention_max_distance", WHOLE, T5Config().max_distance),
    )
    return Found("t5", "transformers", prefix, config, text.T5_RULES)


def _clip(prefix: str, shapes: Shapes, hints: Mapping[str, Any]) -> Found:
    layer = "text_model.encoder.layers"
    hidden, width = _dims(shapes, f"{layer}.0.mlp.fc1.weight", 2)
    end = told(hints, "eos_token_id", WHOLE, 2)
    heads = told(hints, "num_attention_heads", WHOLE, width // 64)
    if heads < 1 or width % heads:
        raise ConversionError(f"the heads of width {width} are not known: name num_attention_heads in a config.json")
    _same(hints, "hidden_act", "quick_gelu")
    _same(hints, "layer_norm_eps", 1e-5)
    config = ClipConfig(
        vocab=_dims(shapes, "text_model.embeddings.token_embedding.weight", 2)[0],
        width=width,
        blocks=_count(shapes, layer),
        heads=heads,
        hidden=hidden,
        max_tokens=_dims(shapes, "text_model.embeddings.position_embedding.weight", 2)[0],
        end_token=None if end == 2 else end,
    )
    return Found("clip", "transformers", prefix, config, text.CLIP_RULES)


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
    ("encoder.mid.attn_1.q.weight", _vae("bfl")),
    ("encoder.mid_block.attentions.0.to_q.weight", _vae("diffusers")),
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", _t5),
    ("text_model.embeddings.token_embedding.weight", _clip),
)
"""A name that only one kind of model has, and how its geometry is read."""
