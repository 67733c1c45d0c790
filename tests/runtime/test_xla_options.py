"""Options come and go with XLA's versions. It knows those of all platforms on any, so a CPU tells of GPUs' too."""

import jax
import pytest

from shortcut_jax.runtime import xla_options
from shortcut_jax.runtime.xla_options import OPTIONS, compiler_options, is_known


@pytest.fixture
def on(monkeypatch):
    """Options of a platform, as the installed XLA has them."""

    def options(platform):
        monkeypatch.setattr(xla_options, "platform_of", lambda _: platform)
        compiler_options.cache_clear()
        return compiler_options(jax.devices()[0])

    yield options
    compiler_options.cache_clear()


def test_a_cpu_has_none():
    assert compiler_options(jax.devices()[0]) is None


def test_each_option_of_gpus_is_known_by_one_of_its_names(on, capfd):
    found = on("gpu")
    assert len(found) == len(OPTIONS["gpu"])
    for names in OPTIONS["gpu"]:
        (name,) = found.keys() & names.keys()
        assert found[name] == names[name]
    assert "note" not in capfd.readouterr().err


def test_what_xla_does_not_know_is_left_out_and_said(on, monkeypatch, capfd):
    known = OPTIONS["gpu"][0]
    monkeypatch.setitem(OPTIONS, "gpu", ({"xla_gpu_no_such_option": True, "xla_gpu_nor_this": 1}, known))
    assert on("gpu") == known
    line = "note: this version of XLA has no option xla_gpu_no_such_option or xla_gpu_nor_this: the step may be slower"
    assert capfd.readouterr().err.strip() == line


def test_an_option_is_known_by_its_newest_name_first(on, monkeypatch):
    (known,) = OPTIONS["gpu"][0]
    monkeypatch.setitem(OPTIONS, "gpu", ({"xla_gpu_new_name": True, known: True},))
    assert on("gpu") == {known: True}


@pytest.mark.parametrize(("name", "value"), [("xla_gpu_no_such_option", True), ("xla_gpu_first_collective", "what")])
def test_unknown_names_and_values_are_not_known(name, value):
    assert not is_known(name, value, jax.devices()[0])


def test_other_errors_are_not_taken_for_an_unknown_option(monkeypatch):
    def fails(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(xla_options.jax, "jit", fails)
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
        is_known("xla_gpu_enable_latency_hiding_scheduler", True, jax.devices()[0])
