import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.core.latents import image_ids, patchify, text_ids, unpatchify


@pytest.mark.parametrize(("height", "width", "channels"), [(4, 6, 3), (2, 8, 1), (6, 2, 16)])
def test_unpatchify_undoes_patchify(height, width, channels):
    latents = np.random.default_rng(0).standard_normal((2, height, width, channels)).astype(np.float32)
    packed = patchify(jnp.asarray(latents))
    assert packed.shape == (2, height * width // 4, 4 * channels)
    np.testing.assert_array_equal(unpatchify(packed, height, width), latents)


def test_packed_channels_are_ordered_channel_row_column_and_tokens_in_raster_order():
    row, column, channel = np.meshgrid(np.arange(4), np.arange(4), np.arange(2), indexing="ij")
    packed = np.asarray(patchify(jnp.asarray(100 * channel + 10 * row + column)[None]))[0]
    np.testing.assert_array_equal(packed[0], [0, 1, 10, 11, 100, 101, 110, 111])
    np.testing.assert_array_equal(packed[:, 0], [0, 2, 20, 22])
    np.testing.assert_array_equal(packed[1], packed[0] + 2)


def test_rows_of_a_batch_stay_apart():
    latents = jnp.arange(3.0)[:, None, None, None] * jnp.ones((3, 4, 2, 1))
    np.testing.assert_array_equal(patchify(latents)[:, 1, 3], [0.0, 1.0, 2.0])


def test_image_ids_are_the_places_of_the_patches():
    expected = [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]
    np.testing.assert_array_equal(image_ids(4, 6), expected)


def test_image_ids_go_with_the_tokens_of_patchify():
    row, column = np.meshgrid(np.arange(6) // 2, np.arange(4) // 2, indexing="ij")
    packed = patchify(jnp.asarray(np.stack([row, column], axis=-1)[None]))
    np.testing.assert_array_equal(packed[0, :, [0, 4]].T, image_ids(6, 4)[:, 1:])


def test_text_ids_are_all_zero():
    ids = text_ids(5)
    assert ids.shape == (5, 3) and ids.dtype == image_ids(4, 4).dtype == jnp.float32 and not np.any(ids)
