"""The text tower of CLIP (Radford et al. 2021; L/14 geometry by default) in Flax linen, its blocks scanned.

Beyond the legend in `core/types.py`: F hidden width of an MLP. Here D is the pooled width that Flux calls V.
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


class ClipOutput(NamedTuple):
    """States of all tokens and of the end token.

    Attributes:
      states_BMD: after the final norm.
      pooled_BD: the state at the first end token.
    """

    states_BMD: Array
    pooled_BD: Array


def _linear(
    cfg: ClipConfig, name: str, out: tuple[int, ...], names: tuple[str | None, ...], in_dims: int = 1
) -> Linear:
    init = nn.initializers.normal(0.02)
    dtypes = (cfg.compute_dtype, cfg.param_dtype, "float32")
    return Linear(out, names, init, *dtypes, constrain=cfg.constrain, in_dims=in_dims, name=name)


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
    """Causal self-attention and an MLP with the sigmoid approximation of GELU, x sigmoid(1.702 x)."""

    cfg: ClipConfig

    @nn.compact
    def __call__(self, x_BMD: Array) -> Any:
        cfg = self.cfg
        stream, heads = ("batch", None, None), ("batch", None, "heads", None)
        normed_BMD = LayerNorm(cfg.param_dtype, name="attn_norm")(x_BMD)
        out = (3, cfg.heads, cfg.width // cfg.heads)
        qkv = _linear(cfg, "qkv", out, ("shard", None, "heads", None))(normed_BMD)
        q, k, v = (cfg.constrain(qkv[:, :, i], heads) for i in range(3))
        attn_BMHK = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
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
