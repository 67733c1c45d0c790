from types import SimpleNamespace

import pytest

from shortcut_jax.errors import ConfigError
from shortcut_jax.runtime.device_table import require_float8


def _device(platform, kind, capability):
    """A device that is not here."""
    return SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)


@pytest.mark.parametrize(
    ("platform", "kind", "capability"),
    [
        ("gpu", "NVIDIA A100-SXM4-80GB", "8.0"),
        ("gpu", "Tesla T4", "7.5"),
        ("gpu", "NVIDIA Something", None),
        ("gpu", "AMD Instinct MI300X", "gfx942"),
        ("tpu", "TPU v5p", None),
    ],
)
def test_float8_is_refused_where_there_are_no_such_products(platform, kind, capability):
    with pytest.raises(ConfigError, match=rf"^mine=float8 needs NVIDIA GPUs .*these are {kind}.*: leave") as e:
        require_float8(_device(platform, kind, capability), "mine", "float8")
    assert "\n" not in str(e.value)
    require_float8(_device(platform, kind, capability), "mine", None)


@pytest.mark.parametrize(
    ("platform", "kind", "capability"),
    [
        ("cpu", "cpu", None),
        ("gpu", "NVIDIA H100 80GB HBM3", "9.0"),
        ("gpu", "NVIDIA H200", None),
        ("gpu", "NVIDIA L4", "8.9"),
        ("gpu", "NVIDIA GeForce RTX 5090", "12.0"),
    ],
)
def test_float8_is_taken_where_there_are(platform, kind, capability):
    require_float8(_device(platform, kind, capability), "mine", "float8")
