"""The Flux.1 transformer (Black Forest Labs, 2024) in Flax linen, its blocks scanned.

Parameter paths and layouts are the package's most expensive decision: every kernel carries its parts (q, k, v;
shift, scale, gate) and its heads as axes, and every block stack has one leading depth axis.

Beyond the legend in `core/types.py`: P parts of a modulation, F hidden width of an MLP.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.ad_checkpoint import checkpoint_name

from shortcut_jax.core.rotary import rotary_phases, rotate, sinusoidal_embedding
from shortcut_jax.core.types import Array
from shortcut_jax.models.attention import PerShard, attend, unsharded
from shortcut_jax.models.float8 import VALUES, scale_of
from shortcut_jax.models.linear import FLOAT8, SCALE, Constrain, Initializer, Linear, no_constraint, xavier_uniform

TIME_FEATURES = 256
"""Sinusoidal features of a timestep, guidance scale or step size."""

ATTENTION, MLP_IN, BRANCH = "attention", "mlp_in", "branch"
REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    # Keeps what a gate multiplies, whose gradient alone would need the last product of a branch again.
    "branch": jax.checkpoint_policies.save_only_these_names(BRANCH),
    "branch_mlp": jax.checkpoint_policies.save_only_these_names(BRANCH, MLP_IN),
    # Keeps what is dear to compute and small to hold: attention's output and the hidden MLP activation's input.
    "selective": jax.checkpoint_policies.save_only_these_names(ATTENTION, MLP_IN),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""Named rematerialisation policies of a block: what the backward pass keeps instead of computing again."""


@dataclass(frozen=True)
class FluxConfig:
    """Geometry (a row of `presets.PRESETS`) and the choices of computing it.

    Attributes:
      double_blocks: blocks with separate image and text streams.
      single_blocks: blocks on the joined stream.
      width: D.
      heads: H; the head size K = width / heads.
      axes: rotary channels of each id axis (constant, row, column); they sum to K.
      channels: C, packed channels in and out.
      text_width: T.
      pooled_width: V.
      guidance: whether there is a guidance embedding (FLUX.1-dev).
      step_size: whether there is a step-size embedding (shortcut models); not part of Flux.
      mlp_ratio: F = mlp_ratio * width.
      theta: base of the rotary frequencies.
      compute_dtype: dtype of activations and matrix products.
      matmul_dtype: `float8` for the operands of the blocks' matrix products (see `models/float8.py`), but for those of
        modulations and adapters; None for the compute dtype.
      param_dtype: dtype of the weights.
      grad_reduce_dtype: dtype in which weight gradients are added up between devices.
      remat: a key of `REMAT_POLICIES`.
      attention: `xla`, `cudnn` or `pallas` (see `attention.choose_backend`).
      scan_unroll: blocks a loop iteration of the compiled program holds.
      forward_mode: whether it is differentiated in forward mode (see `linear.LinearOptions`), with `xla` attention.
      constrain: applies a sharding by logical axis names; the identity by default.
      per_shard: wraps a function of q, k, v so that each device runs it on its own rows and heads; the identity by
        default. Kernels that the partitioner cannot split go through it.
    """

    double_blocks: int
    single_blocks: int
    width: int
    heads: int
    axes: tuple[int, ...]
    channels: int
    text_width: int
    pooled_width: int
    guidance: bool = False
    step_size: bool = False
    mlp_ratio: int = 4
    theta: float = 10_000.0
    compute_dtype: str = "float32"
    matmul_dtype: str | None = None
    param_dtype: str = "float32"
    grad_reduce_dtype: str = "float32"
    remat: str = "none"
    attention: str = "xla"
    scan_unroll: int = 1
    forward_mode: bool = False
    constrain: Constrain = no_constraint
    per_shard: PerShard = unsharded

    @property
    def head_size(self) -> int:
        """K, channels a head."""
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """F, the hidden width of a block's MLP."""
        return self.mlp_ratio * self.width


_NORMAL = nn.initializers.normal(0.02)
_ZEROS = nn.initializers.zeros


def _linear(cfg: FluxConfig, name: str, out: tuple[int, ...], names: tuple[str | None, ...], **kwargs: Any) -> Linear:
    init: Initializer = kwargs.pop("kernel_init")
    dtypes = (cfg.compute_dtype, cfg.param_dtype, cfg.grad_reduce_dtype)
    kwargs |= dict(constrain=cfg.constrain, regather=cfg.remat == "none", forward_mode=cfg.forward_mode, name=name)
    return Linear(out, names, init, *dtypes, **kwargs)


def _block_linear(cfg: FluxConfig, *args: Any, **kwargs: Any) -> Linear:
    """One of a block's large products, on which nearly all of a step's time goes."""
    return _linear(cfg, *args, float8=cfg.matmul_dtype == "float8", **kwargs)


def layer_norm(x: Array) -> Array:
    """Normalises the last axis without learned parameters (epsilon 1e-6); statistics in float32."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)
    return y.astype(x.dtype)


def modulate(x_BLD: Array, shift_BD: Array, scale_BD: Array) -> Array:
    """Adaptive layer norm: (1 + scale) * norm(x) + shift."""
    return (1.0 + scale_BD[:, None]) * layer_norm(x_BLD) + shift_BD[:, None]


class HeadNorm(nn.Module):
    """RMS norm over each head's channels, with a learned scale [K] (epsilon 1e-6); computed in float32."""

    param_dtype: str

    @nn.compact
    def __call__(self, x_BLHK: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, x_BLHK.shape[-1:], self.param_dtype)
        y = x_BLHK.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)
        return (y * scale).astype(x_BLHK.dtype)


class Embedder(nn.Module):
    """Two linear layers around SiLU, [B, in] -> [B, D]: the embedding of time, guidance, pooled text and step size."""

    cfg: FluxConfig
    out_init: Initializer = _NORMAL

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg, names = self.cfg, (None, "shard")
        hidden_BD = nn.silu(_linear(cfg, "in_layer", (cfg.width,), names, kernel_init=_NORMAL)(x))
        return _linear(cfg, "out_layer", (cfg.width,), names, kernel_init=self.out_init)(hidden_BD)


class Modulation(nn.Module):
    """`parts` vectors of shift, scale or gate from the conditioning vector, [B, D] -> `parts` x [B, D]."""

    cfg: FluxConfig
    parts: int

    @nn.compact
    def __call__(self, vec_BD: Array) -> list[Array]:
        cfg = self.cfg
        layer = _linear(cfg, "linear", (self.parts, cfg.width), ("shard_all", None, None), kernel_init=_ZEROS)
        # Both whole along D: the kernel, whose parts lie on all devices, would spread its own split to the streams.
        vec_BD = cfg.constrain(nn.silu(vec_BD), ("batch", None))
        out_BPD = cfg.constrain(layer(vec_BD), ("batch", None, None))
        return [out_BPD[:, i] for i in range(self.parts)]


class HeadProjections(nn.Module):
    """Queries, keys and values with their norms and rotation: [B, L, D] -> 3 x [B, L, H, K]."""

    cfg: FluxConfig
    fan_out: int

    @nn.compact
    def __call__(self, x_BLD: Array) -> list[Array]:
        cfg = self.cfg
        init = xavier_uniform(cfg.width, self.fan_out)
        out = (3, cfg.heads, cfg.head_size)
        qkv = _block_linear(cfg, "qkv", out, ("shard", None, "heads", None), kernel_init=init)(x_BLD)
        q, k, v = (cfg.constrain(qkv[:, :, i], ("batch", None, "heads", None)) for i in range(3))
        return [HeadNorm(cfg.param_dtype, name="q_norm")(q), HeadNorm(cfg.param_dtype, name="k_norm")(k), v]


def _attention(cfg: FluxConfig, q: Array, k: Array, v: Array, rope: tuple[Array, Array]) -> Array:
    out_BLHK = attend(rotate(q, *rope), rotate(k, *rope), v, cfg.attention, cfg.per_shard)
    return checkpoint_name(cfg.constrain(out_BLHK, ("batch", None, "heads", None)), ATTENTION)


def _attn_out(cfg: FluxConfig, name: str, fan_in: int, use_bias: bool) -> Linear:
    init = xavier_uniform(fan_in, cfg.width)
    names = ("heads", None, "shard")
    return _block_linear(cfg, name, (cfg.width,), names, kernel_init=init, in_dims=2, use_bias=use_bias)


def _mlp(cfg: FluxConfig, prefix: str, x_BLD: Array, fan_out: int, fan_in: int, low_BLr: Array | None = None) -> Array:
    """GELU MLP. Fans are arguments because Flux's single block fuses these kernels with attention's.

    So does its adapter, if there is one: `low_BLr` is what attention's output adds to that of the MLP's second layer.
    """
    init_in, init_out = xavier_uniform(cfg.width, fan_out), xavier_uniform(fan_in, cfg.width)
    hidden_BLF = _block_linear(cfg, f"{prefix}mlp_in", (cfg.hidden,), ("shard", "mlp"), kernel_init=init_in)(x_BLD)
    hidden_BLF = checkpoint_name(cfg.constrain(hidden_BLF, ("batch", None, "mlp")), MLP_IN)
    layer = _block_linear(cfg, f"{prefix}mlp_out", (cfg.width,), ("mlp", "shard"), kernel_init=init_out)
    return layer(nn.gelu(hidden_BLF, approximate=True), low_BLr)


class DoubleBlock(nn.Module):
    """Image and text streams with weights of their own, joined in attention only."""

    cfg: FluxConfig

    @nn.compact
    def __call__(self, carry: tuple[Array, Array], vec_BD: Array, rope: tuple[Array, Array]) -> Any:
        cfg = self.cfg
        img_BND, txt_BMD = carry
        stream = ("batch", None, None)
        img_mod = Modulation(cfg, 6, name="img_modulation")(vec_BD)
        txt_mod = Modulation(cfg, 6, name="txt_modulation")(vec_BD)
        img_heads = HeadProjections(cfg, 3 * cfg.width, name="img_attn")(modulate(img_BND, *img_mod[:2]))
        txt_heads = HeadProjections(cfg, 3 * cfg.width, name="txt_attn")(modulate(txt_BMD, *txt_mod[:2]))
        q, k, v = (jnp.concatenate([t, i], axis=1) for t, i in zip(txt_heads, img_heads, strict=True))
        attn_BLHK = _attention(cfg, q, k, v, rope)
        num_txt = txt_BMD.shape[1]

        def finish(x: Array, attn: Array, mod: list[Array], prefix: str) -> Array:
            _, _, gate, shift, scale, mlp_gate = mod
            out = _attn_out(cfg, f"{prefix}attn_out", cfg.width, use_bias=True)(attn)
            x = cfg.constrain(x + gate[:, None] * checkpoint_name(out, BRANCH), stream)
            out = _mlp(cfg, prefix, modulate(x, shift, scale), cfg.hidden, cfg.hidden)
            return cfg.constrain(x + mlp_gate[:, None] * checkpoint_name(out, BRANCH), stream)

        img_BND = finish(img_BND, attn_BLHK[:, num_txt:], img_mod, "img_")
        txt_BMD = finish(txt_BMD, attn_BLHK[:, :num_txt], txt_mod, "txt_")
        return (img_BND, txt_BMD), None


class SingleBlock(nn.Module):
    """Attention and MLP in parallel on the joined stream, text first."""

    cfg: FluxConfig

    @nn.compact
    def __call__(self, x_BLD: Array, vec_BD: Array, rope: tuple[Array, Array]) -> Any:
        cfg = self.cfg
        # The fans of Flux's two fused kernels: D -> 3 D + F and D + F -> D.
        fan_out, fan_in = 3 * cfg.width + cfg.hidden, cfg.width + cfg.hidden
        shift, scale, gate = Modulation(cfg, 3, name="modulation")(vec_BD)
        normed_BLD = modulate(x_BLD, shift, scale)
        q, k, v = HeadProjections(cfg, fan_out, name="attn")(normed_BLD)
        attn_BLHK = _attention(cfg, q, k, v, rope)
        attn_out = _attn_out(cfg, "attn_out", fan_in, use_bias=False)
        # The one output bias, and the b of an adapter, live with mlp_out.
        out_BLD = attn_out(attn_BLHK) + _mlp(cfg, "", normed_BLD, fan_out, fan_in, attn_out.low(attn_BLHK))
        return cfg.constrain(x_BLD + gate[:, None] * checkpoint_name(out_BLD, BRANCH), ("batch", None, None)), None


def _scanned(block: type[nn.Module], cfg: FluxConfig, length: int, name: str, initializing: bool) -> nn.Module:
    """A stack of blocks as one scan. The remat wrapper and the scan leave every parameter path as it is."""
    if cfg.remat != "none":
        block = nn.remat(block, policy=REMAT_POLICIES[cfg.remat], prevent_cse=False)
    stack = nn.scan(
        block,
        variable_axes={"params": 0, "lora": 0, "lora_scale": 0, FLOAT8: 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast),
        length=length,
        unroll=cfg.scan_unroll,
        # The check traces the block twice; it is kept where weights are drawn, for it changes which.
        check_constancy_invariants=initializing,
    )
    return stack(cfg, name=name)


def is_float8(path: str) -> bool:
    """Whether `matmul_dtype="float8"` rounds the weight at a path: the kernels of `_block_linear`."""
    return "_blocks/" in path and path.endswith("/kernel") and "modulation/" not in path


def float8_scales(params: Any) -> dict[str, Any]:
    """The collection with the scales of the kernels that `matmul_dtype="float8"` rounds, [depth] each.

    Made outside of the scan over blocks, for all of them at once: inside it, each block would wait for its own.
    """
    kernels = {path: x for path, x in traverse_util.flatten_dict(params, sep="/").items() if is_float8(path)}
    scales = {
        f"{path.removesuffix('kernel')}{SCALE}": scale_of(x, VALUES, range(1, x.ndim)) for path, x in kernels.items()
    }
    return {FLOAT8: traverse_util.unflatten_dict(scales, sep="/")}


class Flux(nn.Module):
    """The velocity network v(x, t | text, pooled text[, guidance][, step size])."""

    cfg: FluxConfig

    @nn.compact
    def __call__(
        self,
        x_BNC: Array,
        t_B: Array,
        txt_BMT: Array,
        vec_BV: Array,
        img_ids_N3: Array,
        txt_ids_M3: Array,
        guidance_B: Array | None = None,
        step_B: Array | None = None,
    ) -> Array:
        """Predicts the velocity, [B, N, C] float32.

        Args:
          x_BNC: noisy packed latents.
          t_B: times in [0, 1]; 1 is noise.
          txt_BMT: text states.
          vec_BV: pooled text vectors.
          img_ids_N3: positions of image tokens (`core.latents.image_ids`).
          txt_ids_M3: positions of text tokens.
          guidance_B: guidance scales; given exactly where `cfg.guidance`.
          step_B: step sizes in [0, 1]; given exactly where `cfg.step_size`.

        Raises:
          ValueError: guidance or step size is missing or superfluous.
        """
        cfg = self.cfg
        for name, wanted, given in (("guidance", cfg.guidance, guidance_B), ("step size", cfg.step_size, step_B)):
            if wanted != (given is not None):
                raise ValueError(f"this model {'needs' if wanted else 'has no'} a {name} input")
        rope = rotary_phases(jnp.concatenate([txt_ids_M3, img_ids_N3]), cfg.axes, cfg.theta)
        vec_BD = self._conditioning(t_B, vec_BV, guidance_B, step_B)
        stream = ("batch", None, None)
        embed = lambda name, fan: _linear(
            cfg, name, (cfg.width,), (None, "shard"), kernel_init=xavier_uniform(fan, cfg.width)
        )
        img_BND = cfg.constrain(embed("img_in", cfg.channels)(x_BNC), stream)
        txt_BMD = cfg.constrain(embed("txt_in", cfg.text_width)(txt_BMT), stream)
        if cfg.double_blocks:
            stack = _scanned(DoubleBlock, cfg, cfg.double_blocks, "double_blocks", self.is_initializing())
            (img_BND, txt_BMD), _ = stack((img_BND, txt_BMD), vec_BD, rope)
        x_BLD = jnp.concatenate([txt_BMD, img_BND], axis=1)
        if cfg.single_blocks:
            stack = _scanned(SingleBlock, cfg, cfg.single_blocks, "single_blocks", self.is_initializing())
            x_BLD, _ = stack(x_BLD, vec_BD, rope)
        shift, scale = Modulation(cfg, 2, name="final_modulation")(vec_BD)
        final = _linear(cfg, "final_linear", (cfg.channels,), ("shard", None), kernel_init=_ZEROS)
        out_BNC = final(modulate(x_BLD[:, txt_BMT.shape[1] :], shift, scale))
        return cfg.constrain(out_BNC.astype(jnp.float32), stream)

    def _conditioning(self, t_B: Array, vec_BV: Array, guidance_B: Array | None, step_B: Array | None) -> Array:
        cfg = self.cfg
        vec_BD = Embedder(cfg, name="time_in")(sinusoidal_embedding(t_B, TIME_FEATURES))
        if guidance_B is not None:
            vec_BD += Embedder(cfg, name="guidance_in")(sinusoidal_embedding(guidance_B, TIME_FEATURES))
        if step_B is not None:
            vec_BD += Embedder(cfg, out_init=_ZEROS, name="step_in")(sinusoidal_embedding(step_B, TIME_FEATURES))
        vec_BD += Embedder(cfg, name="pooled_in")(vec_BV)
        return cfg.constrain(vec_BD, ("batch", None))
