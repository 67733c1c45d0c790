"""InceptionV3 as FID has it (TensorFlow's `inception-2015-12-05`, as pytorch-fid ports it) in Flax linen.

It differs from the InceptionV3 of ImageNet classifiers: average pools do not count the padding, the last block has a
maximum pool where one would expect an average, and the classifier has 1008 outputs. The layers are a table; layers keep
the names of the PyTorch release, in lower case.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from shortcut_jax.core.types import Array

SIDE = 299
"""Rows and columns of an image."""
CLASSES = 1008
"""Outputs of the classifier, of the release's size."""


@dataclass(frozen=True)
class InceptionConfig:
    """Geometry and dtypes.

    Attributes:
      divisor: all widths are those of the release over this; above 1 only in tests.
      compute_dtype: dtype of activations and convolutions.
      param_dtype: dtype of the weights.
    """

    divisor: int = 1
    compute_dtype: str = "float32"
    param_dtype: str = "float32"

    @property
    def features(self) -> int:
        """Pooled features of an image."""
        return 2048 // self.divisor


class Conv(NamedTuple):
    """A convolution with its norm and ReLU; with a stride it has no padding, like all that are `valid`."""

    name: str
    width: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1
    valid: bool = False


class Pool(NamedTuple):
    """A 3 x 3 pool, `average` or `max`; with a stride it has no padding."""

    kind: str
    stride: int = 1


Step = Conv | Pool | tuple[Conv, ...]
"""Convolutions in brackets read the same input, and their outputs are joined."""
Branch = tuple[Step, ...]

_AVERAGE, _MAX, _HALVE = Pool("average"), Pool("max"), Pool("max", 2)

STEM: Branch = (
    Conv("conv2d_1a_3x3", 32, (3, 3), 2),
    Conv("conv2d_2a_3x3", 32, (3, 3), valid=True),
    Conv("conv2d_2b_3x3", 64, (3, 3)),
    _HALVE,
    Conv("conv2d_3b_1x1", 80),
    Conv("conv2d_4a_3x3", 192, (3, 3), valid=True),
    _HALVE,
)


def _a(pooled: int) -> tuple[Branch, ...]:
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, (3, 3)), Conv("branch3x3dbl_3", 96, (3, 3))),
        (_AVERAGE, Conv("branch_pool", pooled)),
    )


def _b() -> tuple[Branch, ...]:
    return (
        (Conv("branch3x3", 384, (3, 3), 2),),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, (3, 3)), Conv("branch3x3dbl_3", 96, (3, 3), 2)),
        (_HALVE,),
    )


def _c(inner: int) -> tuple[Branch, ...]:
    row, column = (1, 7), (7, 1)
    return (
        (Conv("branch1x1", 192),),
        (Conv("branch7x7_1", inner), Conv("branch7x7_2", inner, row), Conv("branch7x7_3", 192, column)),
        (
            Conv("branch7x7dbl_1", inner),
            Conv("branch7x7dbl_2", inner, column),
            Conv("branch7x7dbl_3", inner, row),
            Conv("branch7x7dbl_4", inner, column),
            Conv("branch7x7dbl_5", 192, row),
        ),
        (_AVERAGE, Conv("branch_pool", 192)),
    )


def _d() -> tuple[Branch, ...]:
    return (
        (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2)),
        (
            Conv("branch7x7x3_1", 192),
            Conv("branch7x7x3_2", 192, (1, 7)),
            Conv("branch7x7x3_3", 192, (7, 1)),
            Conv("branch7x7x3_4", 192, (3, 3), 2),
        ),
        (_HALVE,),
    )


def _e(pool: Pool) -> tuple[Branch, ...]:
    fork = lambda name: (Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1)))
    return (
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), fork("branch3x3_2")),
        (Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, (3, 3)), fork("branch3x3dbl_3")),
        (pool, Conv("branch_pool", 192)),
    )


BLOCKS: dict[str, tuple[Branch, ...]] = {
    "mixed_5b": _a(32),
    "mixed_5c": _a(64),
    "mixed_5d": _a(64),
    "mixed_6a": _b(),
    "mixed_6b": _c(128),
    "mixed_6c": _c(160),
    "mixed_6d": _c(160),
    "mixed_6e": _c(192),
    "mixed_7a": _d(),
    "mixed_7b": _e(_AVERAGE),
    "mixed_7c": _e(_MAX),
}
"""Branches of each block, whose outputs are joined, in the order in which they follow the stem."""


class ConvNorm(nn.Module):
    """A convolution without bias, a batch norm at inference (epsilon 1e-3) and a ReLU.

    The norm is an affine map per channel, made from the four stored vectors on the fly: folded into the kernel they
    could not be told apart again, and conversion would not be the identity there and back.
    """

    cfg: InceptionConfig
    conv: Conv

    @nn.compact
    def __call__(self, x_BhwC: Array) -> Array:
        cfg, conv = self.cfg, self.conv
        width = conv.width // cfg.divisor
        init = nn.initializers.he_normal()
        kernel = self.param("kernel", init, (*conv.size, x_BhwC.shape[-1], width), cfg.param_dtype)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        scale = self.param("scale", ones, (width,), cfg.param_dtype)
        bias = self.param("bias", zeros, (width,), cfg.param_dtype)
        mean = self.param("mean", zeros, (width,), cfg.param_dtype)
        variance = self.param("variance", ones, (width,), cfg.param_dtype)
        y_BhwC = jax.lax.conv_general_dilated(
            x_BhwC.astype(cfg.compute_dtype),
            kernel.astype(cfg.compute_dtype),
            (conv.stride, conv.stride),
            "VALID" if conv.valid or conv.stride > 1 else "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        gain = scale * jax.lax.rsqrt(variance + 1e-3)
        return nn.relu(y_BhwC * gain + (bias - mean * gain)).astype(cfg.compute_dtype)


def _pool(pool: Pool, x_BhwC: Array) -> Array:
    where: dict[str, Any] = {"strides": (pool.stride,) * 2, "padding": "VALID" if pool.stride > 1 else "SAME"}
    if pool.kind == "max":
        return nn.max_pool(x_BhwC, (3, 3), **where)
    return nn.avg_pool(x_BhwC, (3, 3), **where, count_include_pad=False)


def _run(cfg: InceptionConfig, branch: Branch, x_BhwC: Array) -> Array:
    for step in branch:
        if isinstance(step, Pool):
            x_BhwC = _pool(step, x_BhwC)
        elif isinstance(step, Conv):
            x_BhwC = ConvNorm(cfg, step, name=step.name)(x_BhwC)
        else:
            x_BhwC = jnp.concatenate([ConvNorm(cfg, c, name=c.name)(x_BhwC) for c in step], axis=-1)
    return x_BhwC


class InceptionBlock(nn.Module):
    """Branches side by side, joined along the channels."""

    cfg: InceptionConfig
    branches: tuple[Branch, ...]

    @nn.compact
    def __call__(self, x_BhwC: Array) -> Array:
        return jnp.concatenate([_run(self.cfg, branch, x_BhwC) for branch in self.branches], axis=-1)


class InceptionV3(nn.Module):
    """Images [B, 299, 299, 3] in [-1, 1] -> pooled features [B, 2048], float32.

    With `classify` the logits [B, 1008] of the classifier instead: it comes with the weights, FID does not use it.
    """

    cfg: InceptionConfig

    @nn.compact
    def __call__(self, x_BhwC: Array, classify: bool = False) -> Array:
        cfg = self.cfg
        x_BhwC = _run(cfg, STEM, x_BhwC)
        for name, branches in BLOCKS.items():
            x_BhwC = InceptionBlock(cfg, branches, name=name)(x_BhwC)
        features_BF = jnp.mean(x_BhwC, axis=(1, 2), dtype=jnp.float32)
        if not classify:
            return features_BF
        classifier = nn.Dense(CLASSES // cfg.divisor, param_dtype=cfg.param_dtype, name="fc")
        return classifier(features_BF)
