"""Buckets: the sizes that images are brought to, and which of them an image goes to."""

import math
import re
from collections.abc import Sequence

from shortcut_jax.data.format import Size
from shortcut_jax.errors import DataError

PUBLISHED_RESOLUTIONS = (256, 512, 1024)
_PUBLISHED = (
    "8x32 8x29 9x28 9x27 9x26 10x25 10x24 11x23 11x22 11x21 12x21 12x20 13x19 13x18 14x18 14x17 15x17 15x16 16x16 "
    "16x15 17x15 17x14 18x14 18x13 19x13 20x12 21x12 22x11 23x11 24x10 25x10 27x9 32x8"
)
"""The aspect ratio bins of PixArt-alpha in sixteenths of the resolution: the same for 256, 512 and 1024."""


def parse_buckets(text: str, resolution: int, multiple: int = 16) -> tuple[Size, ...]:
    """The sizes that a description stands for.

    Args:
      text: `square` (one, resolution x resolution); `aspect` (see `aspect_buckets`); `published` (the 33 aspect ratio
        bins of PixArt-alpha, 1:4 to 4:1, for a resolution of 256, 512 or 1024); or sizes, HEIGHTxWIDTH,HEIGHTxWIDTH.
      resolution: side of the square whose area the images have; sizes that are written out do not depend on it.
      multiple: what heights and widths are multiples of.

    Raises:
      DataError: an unknown description, or sizes that are no multiples or come twice.
    """
    if text in ("square", "aspect", "published"):
        _check_resolution(text, resolution, multiple)
    if text == "square":
        return ((resolution, resolution),)
    if text == "aspect":
        return aspect_buckets(resolution, multiple)
    sizes = [_parse_size(part) for part in (_PUBLISHED if text == "published" else text.replace(",", " ")).split()]
    if text == "published":
        sizes = [(h * resolution // 16, w * resolution // 16) for h, w in sizes]
    if not sizes:
        raise DataError("--buckets is empty: give square, aspect, published, or sizes such as 64x64,48x80")
    for i, (height, width) in enumerate(sizes):
        legal = _legal(height, multiple), _legal(width, multiple)
        if legal != (height, width):
            raise DataError(
                f"--buckets: {height}x{width} is not in multiples of {multiple}; the nearest is {legal[0]}x{legal[1]}"
            )
        if (height, width) in sizes[:i]:
            raise DataError(f"--buckets: {height}x{width} is given twice")
    return tuple(sizes)


def aspect_buckets(resolution: int, multiple: int = 16) -> tuple[Size, ...]:
    """Sizes of about resolution x resolution pixels with aspect ratios from 1:2 to 2:1, the widest first.

    To each short side, a multiple up to `resolution`, goes the long side whose area is nearest to resolution^2; those
    longer than twice the short side are left out. At 64: 48x80, 64x64, 80x48.
    """
    pairs = []
    for short in range(multiple, resolution + 1, multiple):
        long = max(short, _legal(resolution**2 / short, multiple))
        if long <= 2 * short:
            pairs.append((short, long))
    return tuple(sorted({*pairs, *((long, short) for short, long in pairs)}, key=lambda s: (s[0] / s[1], s)))


def nearest(buckets: Sequence[Size], height: int, width: int) -> int:
    """Index of the bucket whose aspect ratio is nearest, by the logarithm of the ratio.

    Among equally near ones: the largest that the image covers, or else the smallest; then the first.
    """
    aspect = math.log(height / width)

    def order(index: int) -> tuple[float, bool, int, int]:
        h, w = buckets[index]
        enlarged = h > height or w > width
        distance = round(abs(math.log(h / w) - aspect), 9)  # ties are ties, whatever the last bits say
        return distance, enlarged, h * w if enlarged else -h * w, index

    return min(range(len(buckets)), key=order)


def _check_resolution(text: str, resolution: int, multiple: int) -> None:
    if resolution < 1 or resolution % multiple:
        legal = _legal(resolution, multiple)
        raise DataError(f"--resolution={resolution} is not a multiple of {multiple}; the nearest is {legal}")
    if text == "published" and resolution not in PUBLISHED_RESOLUTIONS:
        raise DataError(
            f"--buckets=published has sizes for --resolution=256, 512 and 1024, not {resolution}: "
            f"--buckets=aspect makes them for any"
        )


def _parse_size(part: str) -> Size:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", part)
    if not match:
        raise DataError(f"--buckets: {part!r} is neither square, aspect or published nor a size such as 48x80")
    return int(match[1]), int(match[2])


def _legal(side: float, multiple: int) -> int:
    return max(1, math.floor(side / multiple + 0.5)) * multiple
