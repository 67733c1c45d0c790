import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from shortcut_jax.data.records import DataSettings, check_available, open_source, to_latents, to_pixels
from shortcut_jax.errors import DataError


def test_the_set_is_scikit_learns_digits_with_captions(data_dir):
    source = open_source(DataSettings(dir=data_dir))
    assert len(source) == 1797
    bunch = load_digits()
    ours = np.stack([r["image"][..., 0] for r in source]).reshape(1797, -1)
    originals = np.round(bunch.images * (255 / 16)).astype(np.uint8).reshape(1797, -1)
    # TFDS shuffles while it writes: the same images, each with its own label.
    key = lambda images, labels: sorted(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )
    assert key(ours, [r["label"] for r in source]) == key(originals, bunch.target)
    sevens = {r["caption"].decode() for r in source if r["label"] == 7}
    assert sevens == {"a handwritten digit seven"}
    assert len({r["caption"] for r in source}) == 10


def test_pixels_and_latents_are_inverse():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    latents = to_latents(pixels)
    assert latents.min() == -1.0 and latents.max() == 1.0
    np.testing.assert_array_equal(to_pixels(latents), pixels)
    assert to_pixels(np.array([-7.0, 7.0])).tolist() == [0, 255]


def test_absent_data_are_named_at_once(tmp_path):
    with pytest.raises(DataError, match=r"'flowers' is not prepared.*flowers is not found"):
        check_available(DataSettings(name="flowers", dir=str(tmp_path)))
    with pytest.raises(DataError, match=r"shortcut_jax\.prepare.*configs/digits\.py"):
        check_available(DataSettings(name="cc12m_latents_256", store="latents", dir=str(tmp_path)))


def test_an_unreadable_set_is_one_line(tmp_path):
    (tmp_path / "flowers").mkdir()
    with pytest.raises(DataError, match="cannot open the data set 'flowers'") as error:
        open_source(DataSettings(name="flowers", dir=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_reading_needs_neither_tensorflow_nor_torch(data_dir):
    code = (
        "import sys; from shortcut_jax.data.records import *; "
        f"open_source(DataSettings(dir={data_dir!r})); import shortcut_jax.train; "
        "print([m for m in ('tensorflow', 'torch', 'diffusers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
