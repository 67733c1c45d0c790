"""The C library's allocator, where the host computes: what a step has freed is kept for the next one."""

import ctypes
import importlib.util
import os
import sys

_MMAP_MAX, _TRIM_THRESHOLD, _ARENA_MAX = -4, -1, -8
"""Parameters of `mallopt` in glibc's malloc.h."""

_ACCELERATORS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin", "libtpu")
"""Packages by which JAX computes on something else."""


def keep_freed_memory() -> bool:
    """Has glibc keep freed memory, on a machine that computes on its CPU; returns whether it does.

    XLA:CPU allocates the temporaries of a step anew each time. By default glibc takes large blocks from the kernel and
    gives them back, and each page costs a fault the next time it is touched: 58,000 of them, and a quarter of the time,
    in a step of the digits (docs/performance.md). Here blocks come from one heap that does not shrink.

    It has to be called before JAX starts its threads, which otherwise have heaps of their own. Settings of the user
    (GLIBC_TUNABLES, MALLOC_...) stay.
    """
    if sys.platform != "linux" or not _computes_on_cpu() or _is_set():
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):  # another library, as musl
        return False
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _ARENA_MAX: 1}
    return all(libc.mallopt(name, value) == 1 for name, value in settings.items())


def _computes_on_cpu() -> bool:
    """Whether JAX will, as far as that can be known before it starts."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not any(importlib.util.find_spec(name) for name in _ACCELERATORS)


def _is_set() -> bool:
    return "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
