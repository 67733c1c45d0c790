"""Shared fixtures. Eight CPU devices are simulated for the whole suite."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(tmp_path_factory):
    """The suite compiles the same small programs many times."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("jax_cache")))
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
