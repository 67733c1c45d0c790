"""Flux's autoencoder (the KL autoencoder of latent diffusion with 16 latent channels) in Flax linen.

Images are `_BhwC` in [-1, 1]; latents are 8 times smaller each way for the released geometry.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from shortcut_jax.core.types import Array


@dataclass(frozen=True)
class VaeConfig:
    """Geometry and the scale of latents.

    Attributes:
      channels: of the image.
      latent_channels: of the latents.
      widths: channels of each level; every level but the last halves the image.
      level_blocks: residual blocks of a level in the encoder; the decoder has one more.
      groups: of the group norms.
      scale: latents are (z - shift) * scale.
      shift: see `scale`.
      compute_dtype: dtype of activations and convolutions; norms are float32.
      param_dtype: dtype of the weights.
    """

    channels: int = 3
    latent_channels: int = 16
    widths: tuple[int, ...] = (128, 256, 512, 512)
    level_blocks: int = 2
    groups: int = 32
    scale: float = 0.3611
    shift: float = 0.1159
    compute_dtype: str = "float32"
    param_dtype: str = "float32"

    @property
    def factor(self) -> int:
        """How many pixels a latent spans each way."""
        return 2 ** (len(self.widths) - 1)


class Moments(NamedTuple):
    """The encoder's diagonal Gaussian, before `scale` and `shift`; `logvar_BhwC` is clipped to [-30, 20]."""

    mean_BhwC: Array
    logvar_BhwC: Array


def latents_from(moments: Moments, cfg: VaeConfig, key: Array | None = None) -> Array:
    """Latents as Flux sees them: a sample (or the mean, without a key), shifted and scaled."""
    z = moments.mean_BhwC
    if key is not None:
        z = z + jnp.exp(0.5 * moments.logvar_BhwC) * jax.random.normal(key, z.shape, z.dtype)
    return (z - cfg.shift) * cfg.scale


def _conv(cfg: VaeConfig, name: str, width: int, size: int = 3, stride: int = 1) -> nn.Conv:
    # Halving pads below and at the right only, as the original does.
    before = 0 if stride == 2 else size // 2
    dtypes: dict[str, Any] = {"dtype": cfg.compute_dtype, "param_dtype": cfg.param_dtype}
    return nn.Conv(width, (size, size), stride, padding=((before, size // 2),) * 2, name=name, **dtypes)


class GroupNorm(nn.Module):
    """Group norm with scale and bias (epsilon 1e-6); computed in float32."""

    cfg: VaeConfig

    @nn.compact
    def __call__(self, x_BhwC: Array) -> Array:
        b, h, w, c = x_BhwC.shape
        scale = self.param("scale", nn.initializers.ones, (c,), self.cfg.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (c,), self.cfg.param_dtype)
        y = x_BhwC.astype(jnp.float32).reshape(b, h * w, self.cfg.groups, c // self.cfg.groups)
        y = y - jnp.mean(y, axis=(1, 3), keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=(1, 3), keepdims=True) + 1e-6)
        return (y.reshape(b, h, w, c) * scale + bias).astype(x_BhwC.dtype)


class ResidualBlock(nn.Module):
    """Two convolutions behind norms, around which x passes (by a 1 x 1 convolution where the width changes)."""

    cfg: VaeConfig
    width: int

    @nn.compact
    def __call__(self, x_BhwC: Array) -> Array:
        cfg = self.cfg
        y_BhwC = _conv(cfg, "conv_1", self.width)(nn.silu(GroupNorm(cfg, name="norm_1")(x_BhwC)))
        y_BhwC = _conv(cfg, "conv_2", self.width)(nn.silu(GroupNorm(cfg, name="norm_2")(y_BhwC)))
        if x_BhwC.shape[-1] != self.width:
            x_BhwC = _conv(cfg, "shortcut", self.width, size=1)(x_BhwC)
        return x_BhwC + y_BhwC


class PixelAttention(nn.Module):
    """Attention of all pixels with one head as wide as the channels."""

    cfg: VaeConfig

    @nn.compact
    def __call__(self, x_BhwC: Array) -> Array:
        cfg = self.cfg
        b, h, w, c = x_BhwC.shape
        normed_BhwC = GroupNorm(cfg, name="norm")(x_BhwC)
        q, k, v = (_conv(cfg, name, c, size=1)(normed_BhwC).reshape(b, h * w, 1, c) for name in ("q", "k", "v"))
        attn_BhwC = jax.nn.dot_product_attention(q, k, v, implementation="xla").reshape(b, h, w, c)
        return x_BhwC + _conv(cfg, "out", c, size=1)(attn_BhwC)


def _middle(cfg: VaeConfig, x_BhwC: Array) -> Array:
    x_BhwC = ResidualBlock(cfg, cfg.widths[-1], name="mid_block_0")(x_BhwC)
    x_BhwC = PixelAttention(cfg, name="mid_attn")(x_BhwC)
    return ResidualBlock(cfg, cfg.widths[-1], name="mid_block_1")(x_BhwC)


class Encoder(nn.Module):
    """Images [B, h, w, channels] in [-1, 1] -> `Moments`; h and w are multiples of `cfg.factor`."""

    cfg: VaeConfig

    @nn.compact
    def __call__(self, x_BhwC: Array) -> Moments:
        cfg = self.cfg
        x_BhwC = _conv(cfg, "conv_in", cfg.widths[0])(x_BhwC)
        for i, width in enumerate(cfg.widths):
            for j in range(cfg.level_blocks):
                x_BhwC = ResidualBlock(cfg, width, name=f"level_{i}_block_{j}")(x_BhwC)
            if i < len(cfg.widths) - 1:
                x_BhwC = _conv(cfg, f"level_{i}_down", width, stride=2)(x_BhwC)
        x_BhwC = nn.silu(GroupNorm(cfg, name="norm_out")(_middle(cfg, x_BhwC)))
        x_BhwC = _conv(cfg, "conv_out", 2 * cfg.latent_channels)(x_BhwC).astype(jnp.float32)
        mean_BhwC, logvar_BhwC = jnp.split(x_BhwC, 2, axis=-1)
        return Moments(mean_BhwC, jnp.clip(logvar_BhwC, -30.0, 20.0))


class Decoder(nn.Module):
    """Latents before `scale` and `shift` [B, h, w, latent_channels] -> images, float32, about [-1, 1]."""

    cfg: VaeConfig

    @nn.compact
    def __call__(self, z_BhwC: Array) -> Array:
        cfg = self.cfg
        x_BhwC = _middle(cfg, _conv(cfg, "conv_in", cfg.widths[-1])(z_BhwC))
        for i in reversed(range(len(cfg.widths))):
            for j in range(cfg.level_blocks + 1):
                x_BhwC = ResidualBlock(cfg, cfg.widths[i], name=f"level_{i}_block_{j}")(x_BhwC)
            if i > 0:
                x_BhwC = jnp.repeat(jnp.repeat(x_BhwC, 2, axis=1), 2, axis=2)
                x_BhwC = _conv(cfg, f"level_{i}_up", cfg.widths[i])(x_BhwC)
        x_BhwC = nn.silu(GroupNorm(cfg, name="norm_out")(x_BhwC))
        return _conv(cfg, "conv_out", cfg.channels)(x_BhwC).astype(jnp.float32)


class Autoencoder(nn.Module):
    """Encoder and decoder. Apply with `method="encode"` (images -> moments) or `"decode"` (latents -> images)."""

    cfg: VaeConfig

    def setup(self) -> None:
        self.encoder, self.decoder = Encoder(self.cfg), Decoder(self.cfg)

    def encode(self, x_BhwC: Array) -> Moments:
        """Images in [-1, 1] -> the Gaussian of their latents, before `scale` and `shift`."""
        return self.encoder(x_BhwC)

    def decode(self, latents_BhwC: Array) -> Array:
        """Latents as Flux sees them (shifted and scaled) -> images, about [-1, 1]."""
        return self.decoder(latents_BhwC / self.cfg.scale + self.cfg.shift)

    def __call__(self, x_BhwC: Array) -> Array:
        """Reconstructs images from their mean latents."""
        return self.decode(latents_from(self.encode(x_BhwC), self.cfg))
