"""Numbers of the published code that evaluation is held against: `python -m benchmarks.published_metrics`.

pytorch-fid, clean-fid and torch-fidelity all ask for torchvision, which PyPI has for CUDA builds of PyTorch alone:
beside the CPU build that the tests run on it fails to import, and transformers with it. So the tests compare with what
these packages gave once, in `tests/fixtures/published.npz`, which this writes anew. It needs them without what they ask
for:

    pip install --no-deps clean-fid==0.1.35 pytorch-fid==0.3.0 torch-fidelity==0.4.0

and puts a stub of torchvision there while they are imported. Its Inception blocks, which pytorch-fid derives from, are
torch-fidelity's.
"""

import importlib
import sys
import types
from typing import Any
from unittest import mock

import numpy as np
import torch

from shortcut_jax.core.stats import fit_gaussian
from tests import published
from tests.models.inception_reference import images_and_release


class _Stub(types.ModuleType):
    """A module that has every class that is asked of it, each of them empty."""

    __path__ = ()
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _imported() -> dict[str, Any]:
    names = ("models.inception", "models", "datasets", "transforms.functional", "transforms")
    stubs = {f"torchvision.{name}": _Stub(name) for name in names} | {"torchvision": _Stub("torchvision")}
    for name, stub in stubs.items():
        if "." in name:
            folder, leaf = name.rsplit(".", 1)
            setattr(stubs[folder], leaf, stub)
    with mock.patch.dict(sys.modules, stubs):
        importlib.import_module("torch_fidelity")
        blocks = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        inception = stubs["torchvision.models.inception"]
        inception.InceptionA, inception.InceptionC = blocks.InceptionA, blocks.InceptionC
        inception.InceptionE = blocks.InceptionE_1
        modules = ("pytorch_fid.inception", "pytorch_fid.fid_score", "cleanfid.resize", "torch_fidelity.metric_kid")
        return {name: importlib.import_module(name) for name in modules} | {"fidelity": blocks}


def _features(modules: dict[str, Any]) -> dict[str, np.ndarray]:
    """Features of both Inceptions; they load the names of our table strictly."""
    images, released = images_and_release()
    state = {name: torch.from_numpy(value) for name, value in released.items()}

    def fidelity() -> Any:
        with mock.patch.object(torch, "load", lambda *args, **kwargs: state):
            made = modules["fidelity"].FeatureExtractorInceptionV3
            return made("x", ["2048", "logits"], feature_extractor_weights_path="given")

    module = modules["pytorch_fid.inception"]
    module.load_state_dict_from_url = lambda *args, **kwargs: state
    # Built twice, for pytorch-fid puts its own blocks in the place of some.
    module._inception_v3 = lambda **kwargs: fidelity()
    fid = module.InceptionV3().eval()
    channels_first = lambda x: torch.from_numpy(x.transpose(0, 3, 1, 2))
    with torch.no_grad():
        first = fid(channels_first((images / 255).astype(np.float32)))[0].squeeze(-1).squeeze(-1).numpy()
        second, logits = (x.numpy() for x in fidelity()(channels_first(images)))
    found = {"pytorch_fid": first, "fidelity": second, "logits": logits, "names": np.array(sorted(released))}
    return {f"inception/{name}": value for name, value in found.items()}


def main() -> None:
    """Writes `tests/fixtures/published.npz`."""
    modules, found = _imported(), dict[str, Any]()
    resize = modules["cleanfid.resize"].build_resizer("clean")
    for size in published.SIZES:
        resized = np.stack([resize(image) for image in published.images(*size)])
        found[f"clean/{size[0]}x{size[1]}"] = published.thinned(resized)
    for count in published.COUNTS:
        a, b = (fit_gaussian(x) for x in published.pair(count))
        distance = modules["pytorch_fid.fid_score"].calculate_frechet_distance
        found[f"frechet/{count}"] = distance(a.mean, a.covariance, b.mean, b.covariance)
    kid = modules["torch_fidelity.metric_kid"]
    x, y = map(torch.from_numpy, published.kid_pair())
    result = kid.kid_features_to_metric(x, y, **published.KID, verbose=False, rng_seed=2020)
    found["kid"] = np.array([result[kid.KEY_METRIC_KID_MEAN], result[kid.KEY_METRIC_KID_STD]])
    found |= _features(modules)
    np.savez_compressed(published.PATH, **found)
    print(f"written {published.PATH}: {', '.join(found)}")


if __name__ == "__main__":
    main()
