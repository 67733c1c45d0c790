"""The tables of Flux's autoencoder: diffusers' `AutoencoderKL` and Black Forest Labs' `ae.safetensors`.

Both number the levels in their names and skip some layers by width, so a table is made for a number of levels; rows of
layers that a model does not have are passed over.
"""

from typing import NamedTuple

from shortcut_jax.weights.rules import Rule, norm
from shortcut_jax.weights.transforms import Transform, conv, kernel, vector

MATRIX = kernel(in_dims=3)
"""A 1 x 1 convolution stored as a matrix."""


class _Names(NamedTuple):
    """How one source names the parts of the encoder and the decoder.

    Attributes:
      block: a residual block of level i, j.
      resample: the convolution that changes the size at level i.
      middle: the two residual blocks at the lowest level.
      attention: norm, q, k, v and output of the attention there.
      attention_kernel: how that attention's 1 x 1 convolutions are stored.
      norm_out: the last norm.
      shortcut: of a residual block.
    """

    block: str
    resample: str
    middle: tuple[str, str]
    attention: tuple[str, ...]
    attention_kernel: Transform
    norm_out: str
    shortcut: str


def diffusers_rules(levels: int, level_blocks: int) -> tuple[Rule, ...]:
    """The table of `AutoencoderKL`, whose decoder counts levels from the coarsest."""
    attention = tuple(f"mid_block.attentions.0.{n}" for n in ("group_norm", "to_q", "to_k", "to_v", "to_out.0"))
    middle = ("mid_block.resnets.0", "mid_block.resnets.1")
    rest = (middle, attention, MATRIX, "conv_norm_out", "conv_shortcut")
    down = _Names("down_blocks.{i}.resnets.{j}", "down_blocks.{i}.downsamplers.0.conv", *rest)
    up = _Names("up_blocks.{i}.resnets.{j}", "up_blocks.{i}.upsamplers.0.conv", *rest)
    order = list(range(levels))
    return tuple(_half("encoder", down, order, level_blocks) + _half("decoder", up, order[::-1], level_blocks + 1))


def bfl_rules(levels: int, level_blocks: int) -> tuple[Rule, ...]:
    """The table of `ae.safetensors`."""
    attention = tuple(f"mid.attn_1.{n}" for n in ("norm", "q", "k", "v", "proj_out"))
    rest = (("mid.block_1", "mid.block_2"), attention, conv(), "norm_out", "nin_shortcut")
    down = _Names("down.{i}.block.{j}", "down.{i}.downsample.conv", *rest)
    up = _Names("up.{i}.block.{j}", "up.{i}.upsample.conv", *rest)
    order = list(range(levels))
    return tuple(_half("encoder", down, order, level_blocks) + _half("decoder", up, order, level_blocks + 1))


def _half(side: str, names: _Names, order: list[int], level_blocks: int) -> list[Rule]:
    """Encoder or decoder; `order[i]` is the number that the source gives to our level i (0 is the finest)."""
    rules = _conv(f"{side}.conv_in", f"{side}/conv_in") + _conv(f"{side}.conv_out", f"{side}/conv_out")
    rules += norm(f"{side}.{names.norm_out}", f"{side}/norm_out")
    for level, number in enumerate(order):
        for j in range(level_blocks):
            source = f"{side}.{names.block.format(i=number, j=j)}"
            rules += _residual(source, f"{side}/level_{level}_block_{j}", names.shortcut)
        way = "down" if side == "encoder" else "up"
        rules += _conv(f"{side}.{names.resample.format(i=number)}", f"{side}/level_{level}_{way}")
    for j, middle in enumerate(names.middle):
        rules += _residual(f"{side}.{middle}", f"{side}/mid_block_{j}", names.shortcut)
    first, *convs = names.attention
    rules += norm(f"{side}.{first}", f"{side}/mid_attn/norm")
    for source, target in zip(convs, ("q", "k", "v", "out"), strict=True):
        rules += _conv(f"{side}.{source}", f"{side}/mid_attn/{target}", names.attention_kernel)
    return rules


def _residual(source: str, target: str, shortcut: str) -> list[Rule]:
    return [
        *norm(f"{source}.norm1", f"{target}/norm_1"),
        *_conv(f"{source}.conv1", f"{target}/conv_1"),
        *norm(f"{source}.norm2", f"{target}/norm_2"),
        *_conv(f"{source}.conv2", f"{target}/conv_2"),
        *_conv(f"{source}.{shortcut}", f"{target}/shortcut"),
    ]


def _conv(source: str, target: str, transform: Transform | None = None) -> list[Rule]:
    return [
        Rule((f"{source}.weight",), (f"{target}/kernel",), transform or conv()),
        Rule((f"{source}.bias",), (f"{target}/bias",), vector()),
    ]
