"""The towers of CLIP (Radford et al. 2021; L/14 geometry by default) in Flax linen, their blocks scanned.

Flux uses the text tower alone; the two together, projected into a joint space, score images against texts.

Beyond the legend in `core/types.py`: F hidden width of an MLP, E joint width. Here D is the pooled width that Flux
calls V, and M also counts the patches of an image and its class token.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from shortcut_jax.core.types import Array
from shortcut_jax.models.linear import Constrain, Linear, no_constraint


@dataclass(frozen=True)
class ClipConfig:
    """Geometry and dtypes.

    Attributes:
      vocab: tokens known.
      width: D.
      blocks: transformer blocks.
      heads: H.
      hidden: F.
      max_tokens: positions known.
      end_token: id of the end of a text, whose state is the pooled vector; None for the largest id of a row, which is
        how the first releases find it.
      compute_dtype: dtype of activations and matrix products; norms and softmax are float32.
      param_dtype: dtype of the weights.
      constrain: applies a sharding by logical axis names.
    """

    vocab: int = 49408
    width: int = 768
    blocks: int = 12
    heads: int = 12
    hidden: int = 3072
    max_tokens: int = 77
    end_token: int | None = None
    compute_dtype: str = "float32"
    param_dtype: str = "float32"
    constrain: Constrain = no_constraint


@dataclass(frozen=True)
class ClipImageConfig:
    """Geometry and dtypes of the image tower.

    Attributes:
      side: rows and columns of an image.
      patch: rows and columns of a patch.
      width: D.
      blocks: transformer blocks.
      heads: H.
      hidden: F.
      compute_dtype: see `ClipConfig`.
      param_dtype: see `ClipConfig`.
      constrain: see `ClipConfig`.
    """

    side: int = 224
    patch: int = 14
    width: int = 1024
    blocks: int = 24
    heads: int = 16
    hidden: int = 4096
    compute_dtype: str = "float32"
    param_dtype: str = "float32"
    constrain: Constrain = no_constraint


@dataclass(frozen=True)
class ClipPairConfig:
    """Geometry and dtypes of both towers.

    Attributes:
      joint: E.
      side: rows and columns of an image; `image_*` are the rest of the image tower's `ClipImageConfig`.
      patch: see `side`.
      image_width: see `side`.
      image_blocks: see `side`.
      image_heads: see `side`.
      image_hidden: see `side`.
      vocab: tokens known; `text_*` are the rest of the text tower's `ClipConfig`.
      text_width: see `vocab`.
      text_blocks: see `vocab`.
      text_heads: see `vocab`.
      text_hidden: see `vocab`.
      max_tokens: positions known.
      end_token: see `ClipConfig`.
      compute_dtype: see `ClipConfig`.
      param_dtype: see `ClipConfig`.
      constrain: see `ClipConfig`.
    """

    joint: int = 768
    side: int = 224
    patch: int = 14
    image_width: int = 1024
    image_blocks: int = 24
    image_heads: int = 16
    image_hidden: int = 4096
    vocab: int = 49408
    text_width: int = 768
    text_blocks: int = 12
    text_heads: int = 12
    text_hidden: int = 3072
    max_tokens: int = 77
    end_token: int | None = None
    compute_dtype: str = "float32"
    param_dtype: str = "float32"
    constrain: Constrain = no_constraint

    @property
    def image(self) -> ClipImageConfig:
        """Of the image tower."""
        sizes = (self.image_width, self.image_blocks, self.image_heads, self.image_hidden)
        return ClipImageConfig(self.side, self.patch, *sizes, self.compute_dtype, self.param_dtype, self.constrain)

    @property
    def text(self) -> ClipConfig:
        """Of the text tower."""
        sizes = (self.text_width, self.text_blocks, self.text_heads, self.text_hidden, self.max_tokens, self.end_token)
        return ClipConfig(self.vocab, *sizes, self.compute_dtype, self.param_dtype, self.constrain)


class ClipOutput(NamedTuple):
    """States of all tokens and of the end token.

    Attributes:
      states_BMD: after the final norm.
      pooled_BD: the state at the first end token.
    """

    states_BMD: Array
    pooled_BD: Array


Tower = ClipConfig | ClipImageConfig


def _linear(
    cfg: Tower | ClipPairConfig,
    name: str | None,
    out: tuple[int, ...],
    names: tuple[str | None, ...],
    in_dims: int = 1,
    use_bias: bool = True,
) -> Linear:
    init = nn.initializers.normal(0.02)
    dtypes = (cfg.compute_dtype, cfg.param_dtype, "float32")
    return Linear(out, names, init, *dtypes, constrain=cfg.constrain, in_dims=in_dims, use_bias=use_bias, name=name)


class LayerNorm(nn.Module):
    """Layer norm over the last axis with scale and bias (epsilon 1e-5); computed in float32."""

    param_dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-5)
        return (y * scale + bias).astype(x.dtype)


class ClipBlock(nn.Module):
    """Self-attention, causal among words, and an MLP with the sigmoid approximation of GELU, x sigmoid(1.702 x)."""

    cfg: Tower
    is_causal: bool = True

    @nn.compact
    def __call__(self, x_BMD: Array) -> Any:
        cfg = self.cfg
        stream, heads = ("batch", None, None), ("batch", None, "heads", None)
        normed_BMD = LayerNorm(cfg.param_dtype, name="attn_norm")(x_BMD)
        out = (3, cfg.heads, cfg.width // cfg.heads)
        qkv = _linear(cfg, "qkv", out, ("shard", None, "heads", None))(normed_BMD)
        q, k, v = (cfg.constrain(qkv[:, :, i], heads) for i in range(3))
        attn_BMHK = jax.nn.dot_product_attention(q, k, v, is_causal=self.is_causal, implementation="xla")
        layer = _linear(cfg, "attn_out", (cfg.width,), ("heads", None, "shard"), in_dims=2)
        x_BMD = cfg.constrain(x_BMD + layer(cfg.constrain(attn_BMHK, heads)), stream)

        hidden_BMF = _linear(cfg, "mlp_in", (cfg.hidden,), ("shard", "mlp"))(
            LayerNorm(cfg.param_dtype, name="mlp_norm")(x_BMD)
        )
        hidden_BMF = cfg.constrain(hidden_BMF * nn.sigmoid(1.702 * hidden_BMF), ("batch", None, "mlp"))
        x_BMD = x_BMD + _linear(cfg, "mlp_out", (cfg.width,), ("mlp", "shard"))(hidden_BMF)
        return cfg.constrain(x_BMD, stream), None


class ClipText(nn.Module):
    """Token ids [B, M] -> `ClipOutput`."""

    cfg: ClipConfig

    @nn.compact
    def __call__(self, ids_BM: Array) -> ClipOutput:
        cfg = self.cfg
        normal = nn.initializers.normal(0.02)
        table_VD = self.param("token_embedding", normal, (cfg.vocab, cfg.width), cfg.param_dtype)
        place_MD = self.param("position_embedding", normal, (cfg.max_tokens, cfg.width), cfg.param_dtype)
        x_BMD = (table_VD[ids_BM] + place_MD[: ids_BM.shape[1]]).astype(cfg.compute_dtype)
        stack = nn.scan(ClipBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=cfg.blocks)
        x_BMD, _ = stack(cfg, name="encoder_blocks")(cfg.constrain(x_BMD, ("batch", None, None)))
        x_BMD = LayerNorm(cfg.param_dtype, name="final_norm")(x_BMD)
        # argmax gives the first of several: the end token is also CLIP's padding.
        end_B = jnp.argmax(ids_BM if cfg.end_token is None else ids_BM == cfg.end_token, axis=1)
        return ClipOutput(x_BMD, jnp.take_along_axis(x_BMD, end_B[:, None, None], axis=1)[:, 0])


class ClipImage(nn.Module):
    """Images [B, side, side, 3], normalised -> the class token's state after the final norm [B, D]."""

    cfg: ClipImageConfig

    @nn.compact
    def __call__(self, x_BhwC: Array) -> Array:
        cfg = self.cfg
        normal = nn.initializers.normal(0.02)
        dtypes: dict[str, Any] = {"dtype": cfg.compute_dtype, "param_dtype": cfg.param_dtype}
        size = (cfg.patch, cfg.patch)
        patches_BhwD = nn.Conv(cfg.width, size, size, "VALID", use_bias=False, name="patch_embedding", **dtypes)(x_BhwC)
        b, h, w, width = patches_BhwD.shape
        class_D = self.param("class_embedding", normal, (width,), cfg.param_dtype)
        place_MD = self.param("position_embedding", normal, (h * w + 1, width), cfg.param_dtype)
        class_B1D = jnp.broadcast_to(class_D.astype(cfg.compute_dtype), (b, 1, width))
        x_BMD = jnp.concatenate([class_B1D, patches_BhwD.reshape(b, h * w, width)], axis=1)
        x_BMD = LayerNorm(cfg.param_dtype, name="first_norm")((x_BMD + place_MD).astype(cfg.compute_dtype))
        stack = nn.scan(ClipBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=cfg.blocks)
        x_BMD, _ = stack(cfg, is_causal=False, name="encoder_blocks")(cfg.constrain(x_BMD, ("batch", None, None)))
        return LayerNorm(cfg.param_dtype, name="final_norm")(x_BMD[:, 0])


class ClipPair(nn.Module):
    """Both towers into their joint space. Apply with `method="images"` or `"texts"`; embeddings are not normalised."""

    cfg: ClipPairConfig

    def setup(self) -> None:
        cfg = self.cfg
        self.image, self.text = ClipImage(cfg.image), ClipText(cfg.text)
        project = lambda: _linear(cfg, None, (cfg.joint,), ("shard", None), use_bias=False)
        self.image_projection, self.text_projection = project(), project()

    def images(self, x_BhwC: Array) -> Array:
        """Images [B, side, side, 3], normalised -> embeddings [B, E]."""
        return self.image_projection(self.image(x_BhwC))

    def texts(self, ids_BM: Array) -> Array:
        """Token ids [B, M] -> embeddings [B, E]."""
        return self.text_projection(self.text(ids_BM).pooled_BD)

    def __call__(self, x_BhwC: Array, ids_BM: Array) -> tuple[Array, Array]:
        """Embeddings of images and of texts."""
        return self.images(x_BhwC), self.texts(ids_BM)
