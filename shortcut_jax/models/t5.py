"""The T5 v1.1 encoder (Raffel et al. 2020; gated GELU) in Flax linen, its blocks scanned.

Beyond the legend in `core/types.py`: F hidden width of an MLP. Here D is the text width that Flux calls T.
"""

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from shortcut_jax.core.types import Array
from shortcut_jax.models.linear import Constrain, Linear, no_constraint


@dataclass(frozen=True)
class T5Config:
    """Geometry and dtypes.

    Attributes:
      vocab: tokens known.
      width: D.
      blocks: encoder blocks.
      heads: H.
      head_size: K; H K need not be D.
      hidden: F.
      buckets: classes of relative positions.
      max_distance: distance from which on positions share one bucket.
      compute_dtype: dtype of activations and matrix products; norms and softmax are float32.
      param_dtype: dtype of the weights.
      constrain: applies a sharding by logical axis names.
    """

    vocab: int = 32128
    width: int = 4096
    blocks: int = 24
    heads: int = 64
    head_size: int = 64
    hidden: int = 10240
    buckets: int = 32
    max_distance: int = 128
    compute_dtype: str = "float32"
    param_dtype: str = "float32"
    constrain: Constrain = no_constraint


def _linear(cfg: T5Config, name: str, out: tuple[int, ...], names: tuple[str | None, ...], in_dims: int = 1) -> Linear:
    init = nn.initializers.normal(0.02)
    dtypes = (cfg.compute_dtype, cfg.param_dtype, "float32")
    return Linear(out, names, init, *dtypes, constrain=cfg.constrain, in_dims=in_dims, use_bias=False, name=name)


class RMSNorm(nn.Module):
    """RMS norm over the last axis with a learned scale (epsilon 1e-6); computed in float32."""

    param_dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)
        return (y * scale).astype(x.dtype)


def relative_buckets(num_tokens: int, buckets: int, max_distance: int) -> np.ndarray:
    """The class of every (query, key) pair's relative position, [M, M] int32.

    Half of the classes for keys behind the query and half for keys before it; in each half the first half are exact
    distances and the others grow logarithmically up to `max_distance`.
    """
    position = np.arange(num_tokens)
    relative = position[None, :] - position[:, None]
    half, distance = buckets // 2, np.abs(relative)
    exact = half // 2
    # In float32, as T5 was trained with: bucket borders fall on whole numbers.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    far = np.minimum(exact + (ratio * np.float32(half - exact)).astype(np.int32), half - 1)
    return (np.where(distance < exact, distance, far) + half * (relative > 0)).astype(np.int32)


class T5Block(nn.Module):
    """Self-attention without scaling, with a position bias shared by all blocks; then a gated GELU MLP."""

    cfg: T5Config

    @nn.compact
    def __call__(self, x_BMD: Array, bias_1HMM: Array) -> Any:
        cfg = self.cfg
        stream, heads = ("batch", None, None), ("batch", None, "heads", None)
        normed_BMD = RMSNorm(cfg.param_dtype, name="attn_norm")(x_BMD)
        out = (3, cfg.heads, cfg.head_size)
        qkv = _linear(cfg, "qkv", out, ("shard", None, "heads", None))(normed_BMD)
        q, k, v = (cfg.constrain(qkv[:, :, i], heads) for i in range(3))
        attn_BMHK = jax.nn.dot_product_attention(q, k, v, bias=bias_1HMM, scale=1.0, implementation="xla")
        layer = _linear(cfg, "attn_out", (cfg.width,), ("heads", None, "shard"), in_dims=2)
        x_BMD = cfg.constrain(x_BMD + layer(cfg.constrain(attn_BMHK, heads)), stream)

        normed_BMD = RMSNorm(cfg.param_dtype, name="mlp_norm")(x_BMD)
        gate_BMF = _linear(cfg, "mlp_gate", (cfg.hidden,), ("shard", "mlp"))(normed_BMD)
        hidden_BMF = _linear(cfg, "mlp_in", (cfg.hidden,), ("shard", "mlp"))(normed_BMD)
        hidden_BMF = cfg.constrain(nn.gelu(gate_BMF, approximate=True) * hidden_BMF, ("batch", None, "mlp"))
        x_BMD = x_BMD + _linear(cfg, "mlp_out", (cfg.width,), ("mlp", "shard"))(hidden_BMF)
        return cfg.constrain(x_BMD, stream), None


class T5Encoder(nn.Module):
    """Token ids [B, M] -> states [B, M, D] in the compute dtype. Without a mask, as Flux uses it: padding is seen."""

    cfg: T5Config

    @nn.compact
    def __call__(self, ids_BM: Array) -> Array:
        cfg = self.cfg
        normal = nn.initializers.normal(0.02)
        table_VD = self.param("token_embedding", normal, (cfg.vocab, cfg.width), cfg.param_dtype)
        table_RH = self.param("position_bias", normal, (cfg.buckets, cfg.heads), cfg.param_dtype)
        buckets_MM = relative_buckets(ids_BM.shape[1], cfg.buckets, cfg.max_distance)
        bias_1HMM = jnp.transpose(table_RH[buckets_MM], (2, 0, 1))[None].astype(cfg.compute_dtype)
        x_BMD = cfg.constrain(table_VD[ids_BM].astype(cfg.compute_dtype), ("batch", None, None))
        stack = nn.scan(
            T5Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=cfg.blocks
        )
        x_BMD, _ = stack(cfg, name="encoder_blocks")(x_BMD, bias_1HMM)
        return RMSNorm(cfg.param_dtype, name="final_norm")(x_BMD)
