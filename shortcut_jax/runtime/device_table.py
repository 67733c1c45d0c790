"""What devices can do by their makers' data sheets: arithmetic, memory, links."""

import contextlib
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from shortcut_jax.errors import ConfigError


class DeviceSpec(NamedTuple):
    """Figures of one device.

    Attributes:
      kind: how JAX's name of it begins.
      flops: dense FLOP/s of matrix products by what their operands are: `bf16`, `f8`, `tf32`, `f32`.
      capacity: bytes of its memory.
      memory: bytes/s of its memory.
      inside: bytes/s that it sends to the others of its node; on a TPU to its neighbours along one axis, both ways.
      across: bytes/s that it sends to other nodes; None where there are none (the slice of a TPU is one).
      node: devices of a node.
    """

    kind: str
    flops: Mapping[str, float]
    capacity: float
    memory: float
    inside: float
    across: float | None = None
    node: int = 8

    def peak(self, dtype: str) -> float:
        """FLOP/s of matrix products of an HLO dtype, or of `tf32`."""
        name = "f8" if dtype.startswith("f8") else "bf16" if dtype == "f16" else dtype
        if name == "f8" and "f8" not in self.flops:
            name = "bf16"  # it is widened
        return self.flops.get(name, self.flops["f32"])


def _tpu(kind: str, flops: float, capacity: float, memory: float, link: float) -> DeviceSpec:
    """A TPU: a float32 product is one bfloat16 pass unless more precision is asked for."""
    return DeviceSpec(kind, {"bf16": flops, "f32": flops}, capacity, memory, link)


_HOPPER = {"bf16": 989e12, "f8": 1979e12, "tf32": 494e12, "f32": 67e12}
_BLACKWELL = {"bf16": 2250e12, "f8": 4500e12, "tf32": 1120e12, "f32": 75e12}
_GB200 = {"bf16": 2500e12, "f8": 5000e12, "tf32": 1250e12, "f32": 80e12}

DEVICES = (
    DeviceSpec("NVIDIA H100", _HOPPER, 85e9, 3.35e12, 450e9, 50e9),
    DeviceSpec("NVIDIA H200", _HOPPER, 151e9, 4.8e12, 450e9, 50e9),
    DeviceSpec("NVIDIA GH200", _HOPPER, 96e9, 4.0e12, 450e9, 50e9),
    DeviceSpec("NVIDIA B200", _BLACKWELL, 191e9, 7.7e12, 900e9, 50e9),
    DeviceSpec(
        "NVIDIA GB200",
        {"bf16": 2500e12, "f8": 5000e12, "tf32": 1250e12, "f32": 80e12},
        186e9,
        8e12,
        900e9,
        50e9,
        node=72,
    ),
    DeviceSpec("NVIDIA A100", {"bf16": 312e12, "tf32": 156e12, "f32": 19.5e12}, 85e9, 2.04e12, 300e9, 25e9),
    _tpu("TPU v4", 275e12, 32e9, 1.2e12, 90e9),
    _tpu("TPU v5 lite", 197e12, 16e9, 0.81e12, 90e9),
    _tpu("TPU v5", 459e12, 95e9, 2.77e12, 180e9),
    _tpu("TPU v6 lite", 918e12, 32e9, 1.6e12, 180e9),
)
"""Data sheets of NVIDIA (SXM modules; 400 Gb/s of network a GPU, A100 200) and Google; links of TPUs as the scaling
book (jax-ml.github.io/scaling-book) has them."""


def device_spec(device: Any) -> DeviceSpec | None:
    """The figures of a JAX device, or None where its kind is not in the table (such as a CPU)."""
    return next((spec for spec in DEVICES if device.device_kind.startswith(spec.kind)), None)


USABLE = 0.92
"""Share of a GPU's memory that JAX takes with `launch/gpu_env.sh`; the rest is for NCCL, cuDNN and the driver."""


def usable_memory(device: Any) -> float | None:
    """Bytes of a device's memory that JAX may use; None where they are unknown. Of a CPU its share of the machine's."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # a device that is only compiled for
        stats = device.memory_stats()
        if stats and "bytes_limit" in stats:
            return float(stats["bytes_limit"])
    if spec := device_spec(device):
        return USABLE * spec.capacity
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()
    return None


def require_float8(device: Any, name: str, matmul_dtype: str | None) -> None:
    """Raises ConfigError where a setting `name` asks for float8 products of a device that has none.

    A CPU multiplies the same rounded values in float32: slower, and for trying it out.
    """
    if matmul_dtype is None or device.platform == "cpu":
        return
    capability, known = str(getattr(device, "compute_capability", "")), device_spec(device)
    numbers = tuple(map(int, capability.split("."))) if re.fullmatch(r"\d+\.\d+", capability) else (0, 0)
    if not ("f8" in known.flops if known else numbers >= (8, 9)):
        raise ConfigError(
            f"{name}=float8 needs NVIDIA GPUs of compute capability 8.9 or higher (L4, L40S, H100 and later), but "
            f"these are {device.device_kind}{f', {capability}' if numbers != (0, 0) else ''}: leave it out"
        )


def peak_flops(device: Any) -> float | None:
    """Peak bfloat16 FLOP/s of a device, or None where it is unknown."""
    spec = device_spec(device)
    return spec.flops["bf16"] if spec else None
