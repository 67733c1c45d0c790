#!/usr/bin/env bash
# Settings of XLA and NCCL for a process that trains on NVIDIA GPUs, sourced by the scripts of this folder and by the
# image's entry point. What shapes the compiled program (which collectives run beside which work) is in
# shortcut_jax/runtime/xla_options.py instead: it is compiled in, on every launch and in a dry run. What is set already stays;
# XLA_FLAGS are put before yours, and of two the last counts. They have to be the same in all processes (training compares
# them at start).

flags=(
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
