from types import SimpleNamespace

import pytest

from shortcut_jax.cluster.distributed import platform_of


@pytest.mark.parametrize(
    ("platform", "version", "expected"),
    [
        ("gpu", "PJRT C API\ncuda 12090", "gpu"),
        ("gpu", "PJRT C API\nrocm 60400", "rocm"),
        ("cpu", "cpu", "cpu"),
        ("tpu", "PJRT C API\nTFRT TPU v5", "tpu"),
    ],
)
def test_the_gpus_of_two_makers_are_told_apart(platform, version, expected):
    device = SimpleNamespace(platform=platform, client=SimpleNamespace(platform_version=version))
    assert platform_of(device) == expected


def test_a_device_without_a_client_is_its_platform():
    assert platform_of(SimpleNamespace(platform="gpu")) == "gpu"
