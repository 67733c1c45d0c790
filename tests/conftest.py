"""Shared fixtures. Eight CPU devices are simulated for the whole suite."""

import os

# Programs here run for milliseconds and compile for seconds: the cheapest code generation is the fastest suite.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """The suite, and the commands it starts, compile the same small programs many times."""
    folder = str(tmp_path_factory.mktemp("jax_cache"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with the digits, generated once."""
    from shortcut_jax.data.records import DataSettings, open_source

    folder = str(tmp_path_factory.mktemp("tfds"))
    open_source(DataSettings(dir=folder))
    return folder
