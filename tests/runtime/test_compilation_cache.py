from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from shortcut_jax.runtime.compilation_cache import CompileClock, keep_programs


@pytest.fixture
def config():
    """The compilation cache as a new process has it, and afterwards as it was."""
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}
    yield lambda **changes: [jax.config.update(f"jax_{name}", value) for name, value in changes.items()]
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_users_cache_unless_told_otherwise(config, monkeypatch, tmp_path):
    config(compilation_cache_dir=None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert keep_programs() == tmp_path / "shortcut_jax" / "programs" == Path(jax.config.jax_compilation_cache_dir)
    config(compilation_cache_dir=None)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert keep_programs() == Path.home() / ".cache" / "shortcut_jax" / "programs"
    config(compilation_cache_dir="/chosen")  # as JAX_COMPILATION_CACHE_DIR sets it
    assert keep_programs() == Path("/chosen")
    config(compilation_cache_dir=None, enable_compilation_cache=False)
    assert keep_programs() is None and jax.config.jax_compilation_cache_dir is None


def test_the_clock_counts_what_is_compiled_while_it_is_open():
    f, g = jax.jit(lambda x: jnp.sin(x) * 3.25), jax.jit(lambda x: jnp.cos(x) * 3.25)
    x = jnp.ones(7)
    with CompileClock() as clock:
        f(x), f(x)
    assert clock.programs == 1 and clock.seconds > 0
    seconds = clock.seconds
    g(x)
    with CompileClock() as other:
        f(x), g(x)
    assert (clock.programs, clock.seconds) == (1, seconds) and (other.programs, other.seconds) == (0, 0.0)
    assert str(clock).startswith("1 program compiled in ")
