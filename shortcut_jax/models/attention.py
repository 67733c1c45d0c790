"""Attention, in one function with a choice of backend."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from shortcut_jax.core.types import Array

Kernel = Callable[[Array, Array, Array], Array]
PerShard = Callable[[Kernel], Kernel]

BACKENDS = ("auto", "xla", "cudnn", "pallas")
_PALLAS_BLOCK = 128


def choose_backend(backend: str, platform: str, dtype: str, head_size: int) -> str:
    """Resolves `auto` for a platform and names what cannot run.

    Args:
      backend: one of `BACKENDS`.
      platform: `cpu`, `gpu` (NVIDIA), `rocm` (AMD) or `tpu`, of the devices that will run the model.
      dtype: the compute dtype.
      head_size: K.

    Returns:
      `xla`, `cudnn` or `pallas`. `auto` takes cuDNN on NVIDIA for 16-bit dtypes and head sizes that it supports,
      Pallas on TPU, and XLA elsewhere.

    Raises:
      ValueError: an unknown backend, or one that the platform or dtype does not have.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention is {backend!r}, but must be one of {', '.join(BACKENDS)}")
    fits_cudnn = dtype in ("bfloat16", "float16") and head_size % 8 == 0 and head_size <= 128
    if backend == "auto":
        return {"gpu": "cudnn" if fits_cudnn else "xla", "tpu": "pallas"}.get(platform, "xla")
    if backend == "cudnn" and (platform != "gpu" or not fits_cudnn):
        raise ValueError(
            f"attention 'cudnn' needs an NVIDIA GPU, a 16-bit compute dtype and a head size of at most 128 that is a "
            f"multiple of 8, but these are {platform}, {dtype} and {head_size}: use attention='auto'"
        )
    if backend == "pallas" and platform != "tpu":
        raise ValueError(f"attention 'pallas' needs a TPU, but the platform is {platform}: use attention='auto'")
    return backend


def unsharded(kernel: Kernel) -> Kernel:
    """The identity: what `attend` uses where no mesh is given."""
    return kernel


def attend(q_BLHK: Array, k_BLHK: Array, v_BLHK: Array, backend: str, per_shard: PerShard = unsharded) -> Array:
    """Full softmax attention of all L tokens, without a mask, as Flux attends; softmax in float32. [B, L, H, K].

    `per_shard` lets every device run a Pallas kernel on its own rows and heads, for the partitioner cannot split one.
    """
    if backend == "pallas":
        return per_shard(_pallas_tpu)(q_BLHK, k_BLHK, v_BLHK)
    return jax.nn.dot_product_attention(q_BLHK, k_BLHK, v_BLHK, implementation="cudnn" if backend == "cudnn" else "xla")


def _pallas_tpu(q_BLHK: Array, k_BLHK: Array, v_BLHK: Array) -> Array:
    """JAX's TPU flash attention; tokens are padded to its block size and the padding is masked by segment ids."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    b, length, _, head_size = q_BLHK.shape
    padding = -length % _PALLAS_BLOCK
    pad = lambda x: jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
    segments = None
    if padding:
        ids = jnp.broadcast_to((jnp.arange(length + padding) >= length).astype(jnp.int32), (b, length + padding))
        segments = flash.SegmentIds(q=ids, kv=ids)
    out = flash.flash_attention(pad(q_BLHK), pad(k_BLHK), pad(v_BLHK), segment_ids=segments, sm_scale=head_size**-0.5)
    return out.transpose(0, 2, 1, 3)[:, :length]
