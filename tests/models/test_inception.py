import jax
import numpy as np
import pytest

from shortcut_jax.models.inception import InceptionConfig, InceptionV3
from shortcut_jax.weights.inception import RULES
from shortcut_jax.weights.rules import nest
from tests.helpers import relative, to_flax
from tests.references import published
from tests.weights.inception_cases import SMALL, random_release, shapes

FULL = InceptionConfig()


@pytest.mark.slow
def test_features_equal_those_of_pytorch_fid_and_torch_fidelity(monkeypatch, highest_precision):
    """Their own networks with our names, all of which they have to know: they load them strictly."""
    import torch

    released = random_release(FULL)
    state = {name: torch.from_numpy(value) for name, value in released.items()}
    fidelity = _torch_fidelity(state)
    module = published("pytorch_fid.inception")
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: state)
    # Built twice, for pytorch-fid puts its own blocks in the place of some.
    monkeypatch.setattr(module, "_inception_v3", lambda **kwargs: _torch_fidelity(state))
    fid = module.InceptionV3().eval()

    images = np.random.default_rng(1).integers(0, 256, (2, 299, 299, 3), np.uint8)
    x_BhwC = (images / 255).astype(np.float32)
    channels_first = lambda x: torch.from_numpy(x.transpose(0, 3, 1, 2))
    with torch.no_grad():
        first = fid(channels_first(x_BhwC))[0].squeeze(-1).squeeze(-1).numpy()
        second, logits = (x.numpy() for x in fidelity(channels_first(images)))
    params = nest(to_flax(released, RULES, shapes(FULL)))
    apply = jax.jit(lambda x: InceptionV3(FULL).apply({"params": params}, x))
    actual = np.asarray(apply(2 * x_BhwC - 1))
    assert actual.shape == first.shape == (2, 2048) and actual.dtype == np.float32
    assert first.std() > 0.1 and relative(first[:1], first[1:]) > 1e-3  # neither dead nor alike
    assert relative(actual, first) <= 1e-4
    actual = np.asarray(apply((images.astype(np.float32) - 128) / 128))
    assert relative(actual, second) <= 1e-4
    assert relative(actual @ params["fc"]["kernel"] + params["fc"]["bias"], logits) <= 1e-4


def _torch_fidelity(state):
    published("torch_fidelity")
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **kwargs: state)
        return FeatureExtractorInceptionV3("x", ["2048", "logits"], feature_extractor_weights_path="given")


def test_a_small_network_has_the_layers_of_the_large_one():
    assert {k: len(v) for k, v in shapes(SMALL).items()} == {k: len(v) for k, v in shapes(FULL).items()}
    image = np.zeros((3, 299, 299, 3), np.float32)
    params = nest({k: np.zeros(v, np.float32) for k, v in shapes(SMALL).items()})
    out = lambda classify: jax.eval_shape(
        lambda x: InceptionV3(SMALL).apply({"params": params}, x, classify=classify), image
    )
    assert out(False).shape == (3, SMALL.features) and out(True).shape == (3, 63)
