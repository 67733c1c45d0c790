import os

import numpy as np
import pytest
from PIL import Image, features

from shortcut_jax.data.images import MAX_BYTES, BadImage, decode, encode_png, fit, read_image
from tests.data.images import encoded, noise_image


def _reason(data):
    with pytest.raises(BadImage) as error:
        decode(data)
    return error.value.reason


def test_lossless_images_come_back_exactly():
    pixels = noise_image(1, 20, 30)
    for form, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {})):
        np.testing.assert_array_equal(np.asarray(decode(encoded(pixels, form, **options))), pixels)
    np.testing.assert_array_equal(np.asarray(decode(encode_png(pixels))), pixels)
    assert encode_png(pixels) == encode_png(pixels.copy())


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read_and_a_damaged_one_is_corrupt():
    pixels = np.full((16, 16, 3), 200, np.uint8)
    data = encoded(pixels, "AVIF")
    assert abs(np.asarray(decode(data)).astype(int) - 200).max() < 5
    assert _reason(data[:40]) == _reason(data[:-20]) == "corrupt"


def test_only_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    told = {"fifo": "not a file", "zero": "not a file", "folder": "not a file", "loop": "unreadable file"}
    for name, reason in {**told, "absent": "missing file", "fifo/x": "missing file"}.items():
        with pytest.raises(BadImage) as error:
            read_image(tmp_path / name)
        assert error.value.reason == reason
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(BadImage, match="gigantic"):
        read_image(tmp_path / "huge")


def test_other_kinds_of_pixels_become_8_bit_rgb():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    threefold = np.repeat(grey[..., None], 3, -1)
    np.testing.assert_array_equal(np.asarray(decode(encoded(grey))), threefold)
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    assert sixteen.mode.startswith("I;16")
    np.testing.assert_array_equal(np.asarray(decode(encoded(sixteen))), threefold)  # scaled, not clipped
    palette = Image.fromarray(grey).convert("P")
    np.testing.assert_array_equal(np.asarray(decode(encoded(palette))), threefold)
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = np.asarray(decode(encoded(cmyk, "JPEG", quality=95))).mean((0, 1))
    assert red[0] > 240 and red[1:].max() < 15


def test_transparent_is_on_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:, 2:, 3] = 255  # the right half is opaque black
    got = np.asarray(decode(encoded(rgba)))
    assert (got[:, :2] == 255).all() and (got[:, 2:] == 0).all()
    palette = Image.new("P", (2, 2), 0)
    assert (np.asarray(decode(encoded(palette, transparency=0))) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation):
    pixels, exif = noise_image(2, 6, 10), Image.Exif()
    exif[0x0112] = orientation
    turns = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, -1),
        7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
        8: lambda p: np.rot90(p),
    }
    np.testing.assert_array_equal(np.asarray(decode(encoded(pixels, exif=exif))), turns[orientation](pixels))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_cut_off_files_are_truncated(form):
    data = encoded(noise_image(3, 60, 80), form)
    assert _reason(data[: len(data) // 2]) == "truncated"


def test_other_bad_images_have_their_reason():
    whole = encoded(noise_image(4, 60, 80))
    middle = len(whole) // 2
    assert _reason(whole[:middle] + bytes(200) + whole[middle + 200 :]) == "corrupt"
    assert _reason(b"") == "empty"
    assert _reason(b"<html>not found</html>") == "unsupported format"
    assert _reason(encoded(Image.new("F", (4, 4)), "TIFF")) == "unsupported format"
    for form in ("GIF", "WEBP", "PNG"):
        frames = [Image.fromarray(noise_image(i)) for i in range(2)]
        assert _reason(encoded(frames[0], form, save_all=True, append_images=frames[1:])) == "animated"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_by_their_header(monkeypatch):
    for size in ((20_000, 5_000), (60_000, 60_000)):
        data = bytearray(encoded(noise_image()))
        data[16:24] = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
        import zlib

        data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
        assert _reason(bytes(data)) == "gigantic"


def test_fitting_covers_the_bucket_and_keeps_the_middle():
    pixels = noise_image(5, 20, 30)
    image = Image.fromarray(pixels)
    same, enlarged = fit(image, (20, 30))
    np.testing.assert_array_equal(same, pixels)
    assert not enlarged
    cut, enlarged = fit(image, (20, 20))
    np.testing.assert_array_equal(cut, pixels[:, 5:25])
    assert not enlarged
    assert fit(image, (22, 30))[1] and fit(image, (40, 60))[1]
    small, enlarged = fit(Image.new("RGB", (300, 500), (9, 8, 7)), (16, 32))
    assert small.shape == (16, 32, 3) and not enlarged and (small == (9, 8, 7)).all()
    # An image with a dark left and right edge: they are cut away, evenly.
    edged = np.full((40, 80, 3), 200, np.uint8)
    edged[:, :10] = edged[:, -10:] = 0
    assert fit(Image.fromarray(edged), (20, 20))[0].min() > 190
