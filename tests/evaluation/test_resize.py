import numpy as np
import pytest

from shortcut_jax.evaluation.resize import for_clip, for_inception, resize_clean, resize_legacy
from tests.published import SIZES, given, thinned
from tests.published import images as _images


@pytest.mark.parametrize("size", SIZES)
def test_clean_resizing_equals_clean_fid(size):
    actual = resize_clean(_images(*size), 299)
    assert actual.dtype == np.float32 and actual.shape == (2, 299, 299, 3)
    np.testing.assert_array_equal(thinned(actual), given(f"clean/{size[0]}x{size[1]}"))
    assert not np.array_equal(actual, np.round(actual)) or size == (299, 299)  # no rounding to 8 bits


@pytest.mark.parametrize("size", SIZES)
def test_legacy_resizing_equals_the_interpolation_of_pytorch_fid(size):
    import torch

    images = _images(*size)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2)).float()
    expected = torch.nn.functional.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(resize_legacy(images, 299), expected.numpy().transpose(0, 2, 3, 1), atol=2e-3)


def test_each_convention_has_its_own_scale_and_grey_is_repeated():
    flat = np.full((1, 5, 5, 1), 255, np.uint8)
    for resize, white in (("clean", 127 / 128), ("legacy", 1.0)):
        x_BhwC = for_inception(flat, 12, resize)
        assert x_BhwC.shape == (1, 12, 12, 3) and x_BhwC.dtype == np.float32
        np.testing.assert_allclose(x_BhwC, white, rtol=1e-6)
        grey = _images(20, 30, channels=1)
        colour = for_inception(np.repeat(grey, 3, axis=-1), 12, resize)
        np.testing.assert_array_equal(for_inception(grey, 12, resize), colour)


@pytest.mark.parametrize(
    ("images", "resize", "message"),
    [
        (np.zeros((1, 4, 4, 3), np.uint8), "lanczos", "resize is 'lanczos', but must be one of clean, legacy"),
        (np.zeros((1, 4, 4, 3), np.float32), "clean", r"these are float32 of shape \[1, 4, 4, 3\]"),
        (np.zeros((4, 4, 3), np.uint8), "clean", r"uint8 of shape \[4, 4, 3\]"),
        (np.zeros((1, 4, 4, 4), np.uint8), "legacy", r"uint8 of shape \[1, 4, 4, 4\]"),
    ],
)
def test_what_is_no_image_is_refused(images, resize, message):
    with pytest.raises(ValueError, match=message):
        for_inception(images, 12, resize)


def test_images_for_clip_equal_those_of_transformers():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = [_images(*size, count=1)[0] for size in (*SIZES, (224, 500), (301, 225))]
    expected = CLIPImageProcessorPil()(images, return_tensors="np").pixel_values.transpose(0, 2, 3, 1)
    actual = for_clip(images)
    assert actual.shape == (6, 224, 224, 3) and actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    grey = _images(30, 20, channels=1)
    np.testing.assert_array_equal(for_clip(grey, 16), for_clip(np.repeat(grey, 3, axis=-1), 16))
