import jax
import numpy as np
import pytest

from shortcut_jax.models.inception import InceptionV3
from shortcut_jax.weights.inception import RULES
from shortcut_jax.weights.rules import nest
from tests.helpers import relative, to_flax
from tests.models.inception_reference import FULL, images_and_release
from tests.published import given
from tests.weights.inception_cases import SMALL, shapes


@pytest.mark.slow
def test_features_equal_those_of_pytorch_fid_and_torch_fidelity(highest_precision):
    """Their own networks took our names, all of which they had to know, for they load them strictly."""
    images, released = images_and_release()
    assert sorted(released) == given("inception/names").tolist()
    first, second, logits = (given(f"inception/{name}") for name in ("pytorch_fid", "fidelity", "logits"))
    params = nest(to_flax(released, RULES, shapes(FULL)))
    network = jax.jit(lambda params, x: InceptionV3(FULL).apply({"params": params}, x))
    apply = lambda x: network(params, x)
    actual = np.asarray(apply(2 * (images / 255).astype(np.float32) - 1))
    assert actual.shape == first.shape == (2, 2048) and actual.dtype == np.float32
    assert first.std() > 0.1 and relative(first[:1], first[1:]) > 1e-3  # neither dead nor alike
    assert relative(actual, first) <= 1e-4
    actual = np.asarray(apply((images.astype(np.float32) - 128) / 128))
    assert relative(actual, second) <= 1e-4
    assert relative(actual @ params["fc"]["kernel"] + params["fc"]["bias"], logits) <= 1e-4


def test_a_small_network_has_the_layers_of_the_large_one():
    assert {k: len(v) for k, v in shapes(SMALL).items()} == {k: len(v) for k, v in shapes(FULL).items()}
    image = np.zeros((3, 299, 299, 3), np.float32)
    params = nest({k: np.zeros(v, np.float32) for k, v in shapes(SMALL).items()})
    out = lambda classify: jax.eval_shape(
        lambda x: InceptionV3(SMALL).apply({"params": params}, x, classify=classify), image
    )
    assert out(False).shape == (3, SMALL.features) and out(True).shape == (3, 63)
