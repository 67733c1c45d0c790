#!/usr/bin/env bash
# Settings of XLA and NCCL for training on NVIDIA GPUs: the one place for them, sourced by the scripts of this folder and
# by the image's entry point. What is set already stays; XLA_FLAGS are put before yours, and of two the last counts.
# They have to be the same in all processes (training compares XLA_FLAGS at start).

# XLA joins the collectives of small arrays up to this many bytes: at least a block, so that its kernels are gathered by
# one call, and not many more, since what is gathered ahead has to be held. A block of FLUX.1 has 142 M (single) to 340 M
# (double) parameters: up to 0.7 GB of bfloat16 weights, and 1.4 GB of gradients that are added up in float32.
combine=${COMBINE_BYTES:-$((3 << 29))}

flags=(
  # Collectives run while the layers before or after them are computed, instead of between them.
  --xla_gpu_enable_latency_hiding_scheduler=true
  "--xla_gpu_all_gather_combine_threshold_bytes=$combine"
  "--xla_gpu_reduce_scatter_combine_threshold_bytes=$combine"
  "--xla_gpu_all_reduce_combine_threshold_bytes=$combine"
  # Blocks are a loop in the compiled program (nn.scan). Collectives move out of an iteration into the one before or after
  # it, where there is work to hide them; two iterations at a time need no copies of what they carry.
  --xla_gpu_enable_pipelined_all_gather=true
  --xla_gpu_enable_pipelined_reduce_scatter=true
  --xla_gpu_enable_pipelined_all_reduce=true
  --xla_gpu_enable_while_loop_double_buffering=true
  # The first collective builds the communicators, and hosts that compile or read at different speeds meet there: warn
  # after a minute, give up after ten (XLA's default is to give up after 40 s).
  --xla_gpu_first_collective_call_warn_stuck_timeout_seconds=60
  --xla_gpu_first_collective_call_terminate_timeout_seconds=600
  # Later, a collective that does not end means that a peer is lost: end, so that the scheduler starts again.
  --xla_gpu_nccl_termination_timeout_seconds=600
)
export XLA_FLAGS="${flags[*]} ${XLA_FLAGS:-}"

# A host without a usable GPU is an error there; by default JAX would go on with its CPU while the others wait for it.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
# Of the memory of a GPU for XLA's arrays; the rest is for NCCL's buffers, cuDNN and the context, 2 to 4 GB on several hosts.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

# Say what failed, and nothing otherwise. INFO shows which network NCCL has chosen: the first thing to look at when slow.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# InfiniBand retries for longer before it reports a lost link (4.096 us * 2^22 is 17 s, 7 times).
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
