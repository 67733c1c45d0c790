"""Images as they come: decoded to 8-bit RGB or refused with a reason, and brought to the size of a bucket.

Converted, because 8-bit RGB shows what they show: grey, palettes, CMYK, 16 bits (the upper eight are kept) and
transparency (on white). Turned as their EXIF orientation says. Colour profiles are not applied. Refused: what moves
(several frames), 32-bit and floating-point samples, and whatever cannot be decoded to its last row.
"""

import io
import stat
from pathlib import Path

import numpy as np
from PIL import Image

from shortcut_jax.data.format import Size

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
ENDINGS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
"""Of the names of image files, in every kind of source."""
MAX_PIXELS = 89_478_485
"""A larger image is refused from its header: 256 MiB decoded, where PIL starts to warn."""
MAX_BYTES = 2**28
"""A larger file is not read."""

_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_AVIF = (b"ftypavif", b"ftypavis")
_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):  # noqa: N818  (the image is bad, the program is well)
    """An image that is left out: `reason`, such as `truncated` or `missing file`, and `detail` in words."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def read_image(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
      BadImage: it is not found, cannot be read, is too large, or is a FIFO or a device, which might never end.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise BadImage("not a file", f"{path} is {kind_of(found.st_mode)}")
        if found.st_size > MAX_BYTES:
            raise BadImage("gigantic", f"{found.st_size:,} bytes")
        return path.read_bytes()
    except OSError as error:
        reason = "missing file" if isinstance(error, FileNotFoundError | NotADirectoryError) else "unreadable file"
        raise BadImage(reason, error.strerror or str(error)) from error


def kind_of(mode: int) -> str:
    """What a file is by its `st_mode`, in words."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFREG: "a file"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def decode(data: bytes) -> Image.Image:
    """An encoded image as an 8-bit RGB image, upright.

    Raises:
      BadImage: it has to be left out.
    """
    if not data:
        raise BadImage("empty", "the file has no bytes")
    if len(data) > MAX_BYTES:
        raise BadImage("gigantic", f"{len(data):,} bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=_known_formats())
        _check_header(image)
        image.load()
        turn = _TRANSPOSED.get(_orientation(image))
        converted = _to_rgb(image)
        return converted if turn is None else converted.transpose(turn)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage("gigantic", str(error)) from error
    except Image.UnidentifiedImageError as error:
        if data.startswith(_MAGIC) or data[4:12] in _AVIF:
            raise BadImage("truncated" if _cut_off(data) else "corrupt", "its header cannot be read") from error
        raise BadImage("unsupported format", f"none of {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders raise whatever they like for broken data
        reason = "truncated" if "truncated" in str(error) or _cut_off(data) else "corrupt"
        raise BadImage(reason, (str(error) or type(error).__name__).splitlines()[0]) from error


def fit(image: Image.Image, size: Size) -> tuple[np.ndarray, bool]:
    """Pixels [h, w, 3] uint8 of a bucket, and whether the image had to be enlarged for it.

    Resized (Lanczos) so that it just covers the bucket, and cut to its middle; an image whose height or width fits
    already and whose other side is longer is only cut, and one of that very size stays as it is.
    """
    height, width = size
    scale = max(height / image.height, width / image.width)
    if scale == 1:
        top, left = (image.height - height) // 2, (image.width - width) // 2
        return np.asarray(image.crop((left, top, left + width, top + height))), False
    rows, columns = height / scale, width / scale
    y, x = max(0.0, (image.height - rows) / 2), max(0.0, (image.width - columns) / 2)
    box = (x, y, min(x + columns, image.width), min(y + rows, image.height))
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box)), scale > 1


def encode_png(pixels: np.ndarray) -> bytes:
    """Pixels [h, w, 3] uint8 as a PNG, the same bytes every time."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=4)
    return out.getvalue()


def _known_formats() -> list[str]:
    """The formats that this build of Pillow reads: AVIF came with 11.3."""
    Image.init()
    return [form for form in FORMATS if form in Image.OPEN]


def _check_header(image: Image.Image) -> None:
    """Refuses what is not worth decoding."""
    width, height = image.size
    if not width or not height:
        raise BadImage("empty", f"{height} x {width} pixels")
    if width * height > MAX_PIXELS:
        raise BadImage("gigantic", f"{height} x {width} pixels")
    # The further images of an MPO, which many cameras write, are thumbnails or other views.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        raise BadImage("animated", f"{frames} frames")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image).astype(np.int32) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F", "LAB", "HSV"):
        raise BadImage("unsupported format", f"samples of kind {image.mode}")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged notes beside a sound image
        return 1


def _cut_off(data: bytes) -> bool:
    """Whether a file ends before its format says that it ends."""
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-64:]
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in data[-64:]
    if data.startswith(b"RIFF"):
        return len(data) < 12 or len(data) < int.from_bytes(data[4:8], "little") + 8
    return data.startswith(b"GIF8") and not data.rstrip(b"\0").endswith(b";")
