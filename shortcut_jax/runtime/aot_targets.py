"""Devices that need not be there: programs are compiled for them and nothing runs on them."""

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import jax

from shortcut_jax.cluster.distributed import simulate_devices
from shortcut_jax.errors import TargetError

GPUS = tuple(sorted(path.stem for path in (Path(__file__).parent / "gpus").glob("*.txtpb")))
"""GPUs that can be compiled for without one: their figures are in `gpus/`, as XLA's target descriptions."""

TPUS = ("v4", "v5e", "v5p", "v6e")
"""TPUs that can be compiled for without one."""

FORMS = f"cpu:N, gpu:{'|'.join(GPUS)}:NODESxGPUS or tpu:{'|'.join(TPUS)}:XxYxZ"
"""The targets, for messages."""


def target_devices(target: str) -> list[Any]:
    """The devices of a target, real ones for `cpu:N` only.

    Args:
      target: `cpu:8`; `gpu:h100:8x8`, 8 nodes of 8 GPUs; `tpu:v5p:4x4x4`, the chips of a slice.

    Raises:
      TargetError: a target that is not known, or whose compiler is not installed.
    """
    if re.fullmatch(r"cpu:[1-9]\d*", target):
        simulate_devices(int(target.removeprefix("cpu:")))
        return list(jax.devices())
    gpu = re.fullmatch(rf"gpu:({'|'.join(GPUS)}):([1-9]\d*)x([1-9]\d*)", target)
    if gpu:
        return _gpus(target, gpu[1], int(gpu[2]), int(gpu[3]))
    tpu = re.fullmatch(rf"tpu:({'|'.join(TPUS)}):([1-9]\d*(?:x[1-9]\d*){{1,2}})", target)
    if tpu:
        return _tpus(target, tpu[1], tpu[2])
    raise TargetError(f"--target={target}, but must be {FORMS}, such as cpu:8, gpu:h100:8x8 or tpu:v5p:4x4x4")


def _gpus(target: str, name: str, nodes: int, gpus: int) -> list[Any]:
    # PyPI's plugin for CUDA 13 brings its own wheels; both find cuDNN in the package `nvidia`.
    plugins = [find for find in ("jax_cuda12_plugin", "jax_cuda13_plugin") if importlib.util.find_spec(find)]
    if not plugins or importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.cudnn") is None:
        raise TargetError(
            f"--target={target}: JAX's CUDA plugin and its cuDNN are not installed; pip install '.[cuda]' "
            f"(no GPU is needed)"
        )
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")  # constants are made on the host
    config = (Path(__file__).parent / "gpus" / f"{name}.txtpb").read_text()
    shape = f"1x{nodes}x{gpus}"
    described = topologies.get_topology_desc(platform="cuda", topology_name=name, target_config=config, topology=shape)
    return list(described.devices)


def _tpus(target: str, name: str, shape: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise TargetError(f"--target={target}: libtpu is not installed; pip install '.[tpu]' (no TPU is needed)")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{shape}").devices)
    except (RuntimeError, ValueError) as error:
        raise TargetError(f"--target={target}: {str(error).splitlines()[0]}") from None
