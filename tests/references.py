"""The published code that evaluation is held against, imported without torchvision.

pytorch-fid, clean-fid and torch-fidelity all ask for torchvision, which PyPI has for CUDA builds of PyTorch alone:
beside the CPU build that the tests run on it fails to import, and transformers with it. So they are installed without
what they ask for (`tests/references.txt`), and of torchvision a stub is there while they are imported. Its Inception
blocks, which pytorch-fid derives from, are torch-fidelity's.
"""

import functools
import importlib
import sys
import types

import pytest

PUBLISHED = ("torch_fidelity", "pytorch_fid.inception", "pytorch_fid.fid_score", "cleanfid.resize")


class _Stub(types.ModuleType):
    """A module that has every class that is asked of it, each of them empty."""

    __path__ = ()
    __version__ = "0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def published(name):
    """One of `PUBLISHED`; the test is skipped where it is not installed."""
    return _all()[name]


@functools.cache
def _all():
    names = ("models.inception", "models", "datasets", "transforms.functional", "transforms")
    stubs = {f"torchvision.{name}": _Stub(name) for name in names} | {"torchvision": _Stub("torchvision")}
    for name, stub in stubs.items():
        if "." in name:
            folder, leaf = name.rsplit(".", 1)
            setattr(stubs[folder], leaf, stub)
    before = {name: sys.modules[name] for name in stubs if name in sys.modules}
    sys.modules.update(stubs)
    try:
        found = {"torch_fidelity": importlib.import_module("torch_fidelity")}
        blocks = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        inception = stubs["torchvision.models.inception"]
        inception.InceptionA, inception.InceptionC = blocks.InceptionA, blocks.InceptionC
        inception.InceptionE = blocks.InceptionE_1
        return found | {name: importlib.import_module(name) for name in PUBLISHED[1:]}
    except ModuleNotFoundError as error:
        pytest.skip(f"{error}: pip install --no-deps -r tests/references.txt")
    finally:
        for name in stubs:
            del sys.modules[name]
        sys.modules.update(before)
