"""Options that a train step is compiled with, by platform: what XLA does not do by itself, and why we want it.

They are part of the compiled step, so a dry run judges what will run. What concerns the process and not the program
(memory, timeouts, NCCL) is in `launch/gpu_env.sh`.
"""

OPTIONS: dict[str, dict[str, bool | int | str]] = {
    "gpu": {
        # Collectives run while other layers are computed: XLA:GPU does so by default from Hopper on, not on an A100.
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # Gradients of a block are added up between nodes after the block's last matrix product, where nothing is left
        # to hide that. Now it happens while the next block is computed.
        "xla_gpu_enable_pipelined_all_reduce": True,
    },
    "tpu": {
        # XLA:TPU gathers weights between the matrix products by default. Fused with them, a gather runs while the
        # product before it is computed; in several steps, where one product is too short to hide it.
        "xla_enable_async_all_gather": True,
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        # Collectives and matrix products on the tensor core at one time.
        "xla_tpu_overlap_compute_collective_tc": True,
        # Gathers that are fused into both cores of a chip cannot be overlapped.
        "xla_tpu_megacore_fusion_allow_ags": False,
    },
}
"""Platform -> options of `jax.jit(compiler_options=...)`."""


def compiler_options(platform: str) -> dict[str, bool | int | str] | None:
    """The options of a platform; None where there are none."""
    return OPTIONS.get(platform)
