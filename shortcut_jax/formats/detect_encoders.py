"""What models there are in checkpoints, and how the geometry of an encoder is read from names and shapes."""

import difflib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from shortcut_jax.errors import ConversionError
from shortcut_jax.models.clip import ClipConfig, ClipPairConfig
from shortcut_jax.models.inception import CLASSES, InceptionConfig
from shortcut_jax.models.t5 import T5Config
from shortcut_jax.models.vae import VaeConfig
from shortcut_jax.weights import inception, text, vae
from shortcut_jax.weights.entries import NUMBER, WHOLE, told
from shortcut_jax.weights.rules import Rule

Shapes = Mapping[str, tuple[int, ...]]


class Found(NamedTuple):
    """One model in a checkpoint.

    Attributes:
      kind: `flux`, `vae`, `t5` or `clip`; or `clip_score` (both towers of CLIP) or `inception`, which judge images.
      layout: whose names: `bfl`, `diffusers`, `transformers` or `torchvision`.
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


def describe(found: Found) -> str:
    """A model in words: `FLUX.1 transformer with guidance, 19 + 38 blocks of width 3072`."""
    c = found.config
    if found.kind == "flux":
        guidance = "with" if c.guidance else "without"
        return f"Flux transformer {guidance} guidance, {c.double_blocks} + {c.single_blocks} blocks of width {c.width}"
    if found.kind == "vae":
        return f"autoencoder with {c.latent_channels} latent channels"
    if found.kind == "inception":
        return f"InceptionV3 of FID with {c.features} features"
    if found.kind == "clip_score":
        towers = f"image tower of {c.image_blocks} blocks, text tower of {c.text_blocks}"
        return f"CLIP, {towers}, joint width {c.joint}"
    name = "T5 encoder" if found.kind == "t5" else "CLIP text tower"
    return f"{name}, {c.blocks} blocks of width {c.width}"


def count_blocks(shapes: Shapes, stack: str) -> int:
    """Blocks of a stack whose names begin with `stack.NUMBER.`: the depth at which the fewest names are wrong.

    A block that is absent between others is thus missing, while a stray number beyond them is left over.
    """
    places = [n.split(".")[stack.count(".") + 1] for n in shapes if n.startswith(f"{stack}.")]
    sizes = Counter(int(p) for p in places if p.isdecimal())
    whole = max(sizes.values(), default=0)

    def wrong(depth: int) -> int:
        inside = sum(size for i, size in sizes.items() if i < depth)
        return (whole * depth - inside) + (sizes.total() - inside)

    return min((0, *(i + 1 for i in sizes)), key=lambda depth: (wrong(depth), -depth))


def same(hints: Mapping[str, Any], name: str, value: Any) -> None:
    """Refuses a config that asks for another function than the one that is built."""
    if hints.get(name, value) != value:
        raise ConversionError(f"config.json says {name} {hints[name]!r}, but only {value!r} is supported")


def dims(shapes: Shapes, name: str, count: int) -> tuple[int, ...]:
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


def find_vae(layout: str) -> Callable:
    """How an autoencoder is found in a layout, `bfl` or `diffusers`; see `find_t5`."""

    def make(prefix: str, shapes: Shapes, hints: Mapping[str, Any]) -> Found:
        stack = "encoder.down" if layout == "bfl" else "encoder.down_blocks"
        conv = f"{stack}.{{}}.block.0.conv1.weight" if layout == "bfl" else f"{stack}.{{}}.resnets.0.conv1.weight"
        levels = count_blocks(shapes, stack)
        inside = conv.format(0).rsplit(".0.conv1", 1)[0]
        default = VaeConfig()
        config = VaeConfig(
            channels=dims(shapes, "encoder.conv_in.weight", 4)[1],
            latent_channels=dims(shapes, "decoder.conv_in.weight", 4)[1],
            widths=tuple(dims(shapes, conv.format(i), 4)[0] for i in range(levels)),
            level_blocks=count_blocks(shapes, inside),
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


def find_t5(prefix: str, shapes: Shapes, hints: Mapping[str, Any]) -> Found:
    """A T5 encoder under `prefix`, without which `shapes` are named; `hints` are the config.json beside it.

    Raises:
      ConversionError: what its geometry is read from is missing or misshapen, or the config is of another function.
    """
    block = "encoder.block.0.layer"
    same(hints, "feed_forward_proj", "gated-gelu")
    same(hints, "layer_norm_epsilon", 1e-6)
    buckets, heads = dims(shapes, f"{block}.0.SelfAttention.relative_attention_bias.weight", 2)
    inner, width = dims(shapes, f"{block}.0.SelfAttention.q.weight", 2)
    if inner % heads:
        raise ConversionError(f"the {inner} outputs of {block}.0.SelfAttention.q do not divide into {heads} heads")
    config = T5Config(
        vocab=dims(shapes, "shared.weight", 2)[0],
        width=width,
        blocks=count_blocks(shapes, "encoder.block"),
        heads=heads,
        head_size=inner // heads,
        hidden=dims(shapes, f"{block}.1.DenseReluDense.wi_0.weight", 2)[0],
        buckets=buckets,
        max_distance=told(hints, "relative_attention_max_distance", WHOLE, T5Config().max_distance),
    )
    return Found("t5", "transformers", prefix, config, text.T5_RULES)


class _Tower(NamedTuple):
    """Width, blocks, heads and hidden width of a transformer of CLIP."""

    width: int
    blocks: int
    heads: int
    hidden: int


def _tower(shapes: Shapes, model: str, hints: Mapping[str, Any]) -> _Tower:
    layer = f"{model}.encoder.layers"
    hidden, width = dims(shapes, f"{layer}.0.mlp.fc1.weight", 2)
    heads = told(hints, "num_attention_heads", WHOLE, width // 64)
    if heads < 1 or width % heads:
        raise ConversionError(f"the heads of width {width} are not known: name num_attention_heads in a config.json")
    same(hints, "hidden_act", "quick_gelu")
    same(hints, "layer_norm_eps", 1e-5)
    return _Tower(width, count_blocks(shapes, layer), heads, hidden)


def _clip_text(shapes: Shapes, hints: Mapping[str, Any]) -> ClipConfig:
    tower, end = _tower(shapes, "text_model", hints), told(hints, "eos_token_id", WHOLE, 2)
    return ClipConfig(
        vocab=dims(shapes, "text_model.embeddings.token_embedding.weight", 2)[0],
        **tower._asdict(),
        max_tokens=dims(shapes, "text_model.embeddings.position_embedding.weight", 2)[0],
        end_token=None if end == 2 else end,
    )


def find_clip(prefix: str, shapes: Shapes, hints: Mapping[str, Any]) -> Found:
    """CLIP's text tower alone; see `find_t5`."""
    return Found("clip", "transformers", prefix, _clip_text(shapes, hints), text.CLIP_RULES)


def find_clip_pair(prefix: str, shapes: Shapes, hints: Mapping[str, Any]) -> Found:
    """Both towers of CLIP and their projections; see `find_t5`."""
    own = {model: hints.get(f"{model}_config") or {} for model in ("text", "vision")}
    if not all(isinstance(part, dict) for part in own.values()):
        raise ConversionError("text_config and vision_config in config.json are not both JSON objects")
    words, image = _clip_text(shapes, own["text"]), _tower(shapes, "vision_model", own["vision"])
    for model, blocks in (("text", words.blocks), ("vision", image.blocks)):
        said = told(own[model], "num_hidden_layers", WHOLE, blocks, f"{model}_config in config.json")
        if said != blocks:
            raise ConversionError(
                f"config.json says num_hidden_layers {said} of {model}_config, but the checkpoint holds {blocks}: it "
                f"is incomplete, or the config is another model's"
            )
    patch = dims(shapes, "vision_model.embeddings.patch_embedding.weight", 4)[-1]
    patches = dims(shapes, "vision_model.embeddings.position_embedding.weight", 2)[0] - 1
    config = ClipPairConfig(
        joint=dims(shapes, "visual_projection.weight", 2)[0],
        side=patch * math.isqrt(patches),
        patch=patch,
        **{f"image_{name}": value for name, value in image._asdict().items()},
        vocab=words.vocab,
        text_width=words.width,
        text_blocks=words.blocks,
        text_heads=words.heads,
        text_hidden=words.hidden,
        max_tokens=words.max_tokens,
        end_token=words.end_token,
    )
    return Found("clip_score", "transformers", prefix, config, text.CLIP_PAIR_RULES)


def find_inception(prefix: str, shapes: Shapes, hints: Mapping[str, Any]) -> Found:
    """The InceptionV3 of FID, and not torchvision's, which has the same names; see `find_t5`."""
    del hints
    classes, features = dims(shapes, "fc.weight", 2)
    divisor = max(InceptionConfig().features // features, 1)
    if classes != CLASSES // divisor or any(name.startswith("AuxLogits.") for name in shapes):
        raise ConversionError(
            f"this is torchvision's InceptionV3 (fc.weight has {classes} classes): FID has another, with {CLASSES} "
            f"classes and no AuxLogits, in pt_inception-2015-12-05-6726825d.pth of pytorch-fid"
        )
    return Found("inception", "torchvision", prefix, InceptionConfig(divisor), inception.RULES)
