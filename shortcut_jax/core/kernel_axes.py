"""How the axes of a kernel lie, told by its path: [depth, *in, parts, *out], those that it has."""

from typing import NamedTuple

Shape = tuple[int, ...]


class Axes(NamedTuple):
    """The axes of a kernel.

    Attributes:
      depth: blocks; empty outside the stacks.
      inputs: of the input.
      parts: one for q, k and v; empty elsewhere.
      outputs: of the output of one part.
    """

    depth: Shape
    inputs: Shape
    parts: Shape
    outputs: Shape


def kernel_axes(layer: str, shape: Shape) -> Axes:
    """The axes of a kernel of this shape, by the path of its layer."""
    depth, inner = (shape[:1], shape[1:]) if "_blocks/" in layer else ((), shape)
    num_inputs = 2 if layer.endswith("attn_out") else 1  # heads and head size
    inputs, rest = inner[:num_inputs], inner[num_inputs:]
    num_parts = 1 if layer.endswith("qkv") else 0
    return Axes(depth, inputs, rest[:num_parts], rest[num_parts:])
