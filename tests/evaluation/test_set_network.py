"""The network of a set: trained on real images, the same each time, kept beside the set."""

import numpy as np
import pytest

from shortcut_jax.data.records import DataSettings, open_source
from shortcut_jax.errors import UsageError
from shortcut_jax.evaluation import set_network
from shortcut_jax.evaluation.set_network import (
    FEATURES,
    kept_network,
    network_classes,
    network_features,
    network_of,
    train_network,
)


@pytest.fixture(scope="module")
def digits(data_dir):
    source = open_source(DataSettings(dir=data_dir))
    return np.stack([r["image"] for r in source]), np.array([r["label"] for r in source])


@pytest.fixture(scope="module")
def weights(digits):
    images, labels = digits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(set_network, "STEPS", 120)
        return train_network(images[:1500], labels[:1500], 10)


@pytest.mark.slow
def test_it_tells_digits_apart_that_it_has_not_seen(digits, weights):
    images, labels = digits
    found = network_classes(weights)(images[1500:])
    assert np.mean(found == labels[1500:]) > 0.9
    assert np.mean(network_classes(weights)(255 - images[1500:]) == labels[1500:]) < 0.5


def test_its_features_are_those_of_each_image_alone(digits, weights):
    features = network_features(weights)
    many = features(digits[0][:700])
    assert many.shape == (700, FEATURES) == (700, features.size) and many.std(axis=0).min() > 1e-3
    np.testing.assert_allclose(features(digits[0][600:603]), many[600:603], rtol=1e-4, atol=1e-4)


def test_it_is_the_same_each_time(digits, monkeypatch):
    monkeypatch.setattr(set_network, "STEPS", 3)
    one, two, other = (train_network(digits[0][:64], digits[1][:64], 10, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(one[path], two[path]) for path in one)
    assert not all(np.array_equal(one[path], other[path]) for path in one)


def test_it_is_kept_where_that_can_be_and_made_once(tmp_path):
    made, read_only = [], tmp_path / "missing"
    make = lambda: made.append(1) or {"a": np.arange(3.0)}
    for _ in range(2):
        assert kept_network("x", make, [read_only, tmp_path])["a"].tolist() == [0.0, 1.0, 2.0]
    assert len(made) == 1 and not read_only.exists()
    kept_network("y", make, [tmp_path])
    (tmp_path / sorted(p.name for p in tmp_path.iterdir())[0]).write_bytes(b"damaged")
    for identity in "xy":
        kept_network(identity, make, [tmp_path])
    assert len(made) == 3


def test_a_set_of_images_with_captions_of_their_own_has_no_classes():
    class Own:
        identity = "own"

        def labelled(self, most):
            return np.zeros((10, 4, 4, 1), np.uint8), np.arange(10), 10

    with pytest.raises(UsageError, match="learns 2 to 1000 classes of several images each, but 10 images of the set"):
        network_of(Own(), [])
