"""Options that a train step is compiled with, by platform: what XLA does not do by itself, and why we want it.

They are part of the compiled step, so a dry run judges what will run. What concerns the process and not the program
(memory, timeouts, NCCL) is in `launch/gpu_env.sh`. Options come and go with XLA's versions, and it refuses what it does
not know: each is tried first.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from shortcut_jax.cluster.distributed import platform_of, say

Value = bool | str

OPTIONS: dict[str, tuple[dict[str, Value], ...]] = {
    "gpu": (
        # Collectives run while other layers are computed: XLA:GPU does so by default from Hopper on, not on an A100.
        {"xla_gpu_enable_latency_hiding_scheduler": True},
        # Gradients of a block are added up between nodes after the block's last matrix product, where nothing is left
        # to hide that. Now it happens while the next block is computed. (The second name is that before JAX 0.12.)
        {
            "xla_gpu_pipeline_all_reduce": "COLLECTIVE_PIPELINING_MODE_ON",
            "xla_gpu_enable_pipelined_all_reduce": True,
        },
    ),
    "tpu": (
        # XLA:TPU gathers weights between the matrix products by default. Fused with them, a gather runs while the
        # product before it is computed; in several steps, where one product is too short to hide it.
        {"xla_enable_async_all_gather": True},
        {"xla_tpu_enable_async_collective_fusion": True},
        {"xla_tpu_enable_async_collective_fusion_fuse_all_gather": True},
        {"xla_tpu_enable_async_collective_fusion_multiple_steps": True},
        # Collectives and matrix products on the tensor core at one time.
        {"xla_tpu_overlap_compute_collective_tc": True},
        # Gathers that are fused into both cores of a chip cannot be overlapped.
        {"xla_tpu_megacore_fusion_allow_ags": False},
    ),
}
"""Platform -> options of `jax.jit(compiler_options=...)`, each by all the names it has had, the newest first."""


@cache
def compiler_options(device: Any) -> dict[str, Value] | None:
    """The options for a device that the installed XLA knows; None where there are none. Says which it does not know."""
    known: dict[str, Value] = {}
    for names in OPTIONS.get(platform_of(device), ()):
        found = next((name for name in names if is_known(name, names[name], device)), None)
        if found is None:
            say(f"note: this version of XLA has no option {' or '.join(names)}: the step may be slower")
        else:
            known[found] = names[found]
    return known or None


def is_known(name: str, value: Value, device: Any) -> bool:
    """Whether the installed XLA takes a value of an option; compiles an empty program for a device to find out."""
    sharding = SingleDeviceSharding(device)
    program = jax.jit(lambda x: x, in_shardings=sharding, out_shardings=sharding)
    try:
        program.lower(jax.ShapeDtypeStruct((), jnp.float32)).compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError as error:
        if name in str(error):
            return False
        raise
    return True
