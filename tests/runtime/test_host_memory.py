import os
import subprocess
import sys

import pytest

from shortcut_jax.runtime import host_memory

FREED = """
import ctypes, os, resource, sys, threading
from shortcut_jax.runtime.host_memory import keep_freed_memory

print(keep_freed_memory())
libc, size = ctypes.CDLL(None), 64 << 20
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def touch():
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)

def work():
    touch()
    before = faults()
    for _ in range(4):
        touch()
    print((faults() - before) // 4)

thread = threading.Thread(target=work)
thread.start(); thread.join()
"""


def _run(**variables):
    """What `keep_freed_memory` returns in a new process, and the page faults of 64 MiB that a thread takes again."""
    kept = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "JAX_PLATFORMS")}
    env = {k: v for k, v in kept.items() if not k.startswith("MALLOC_")} | variables
    out = subprocess.run([sys.executable, "-c", FREED], env=env, capture_output=True, text=True, check=True).stdout
    done, faults = out.split()
    return done == "True", int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_what_was_freed_costs_no_page_faults_again_where_the_cpu_computes():
    done, faults = _run(JAX_PLATFORMS="cpu")
    assert done and faults < 100
    for variables in ({"JAX_PLATFORMS": "cuda,cpu"}, {"JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "2"}):
        done, faults = _run(**variables)
        assert not done and faults > 100


def test_without_a_platform_that_is_asked_for_the_plugins_decide(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for there, cpu in (("jax_cuda13_plugin", False), ("libtpu", False), ("nothing of the kind", True)):
        monkeypatch.setattr(host_memory.importlib.util, "find_spec", lambda name, there=there: name == there or None)
        assert host_memory._computes_on_cpu() == cpu
