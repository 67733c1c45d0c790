"""Fixtures of the tests of a step."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def programs_of_their_own(compilation_cache):
    """No other test compiles these programs: to write them down for others would take a tenth of the time."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e6)
    yield
    jax.config.update(name, before)
