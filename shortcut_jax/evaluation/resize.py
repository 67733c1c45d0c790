"""Images at the size that a network judges them at, resized as the reference of each measure does.

How images are resized moves FID by more than models differ (Parmar et al. 2022), so both conventions are here.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

RESIZES = ("clean", "legacy")
"""As clean-fid does: bicubic with antialiasing. As pytorch-fid does: bilinear without."""

CLIP_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
CLIP_STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)
"""Of the pixels that CLIP was trained on, in [0, 1]."""

_THREADS = 8  # PIL resizes without Python's lock


def to_rgb(images_BhwC: np.ndarray) -> np.ndarray:
    """Images [B, h, w, 3] uint8; grey ones [B, h, w, 1] three times over.

    Raises:
      ValueError: they are of another kind.
    """
    if images_BhwC.dtype != np.uint8 or images_BhwC.ndim != 4 or images_BhwC.shape[-1] not in (1, 3):
        raise ValueError(
            f"images are uint8 of shape [B, h, w, 3] or [B, h, w, 1], but these are {images_BhwC.dtype} of shape "
            f"{list(images_BhwC.shape)}"
        )
    return np.broadcast_to(images_BhwC, (*images_BhwC.shape[:3], 3))


def resize_clean(images_BhwC: np.ndarray, side: int) -> np.ndarray:
    """Images, uint8 -> [B, side, side, C] float32 in [0, 255], as clean-fid resizes.

    PIL's bicubic filter, wider than the pixels of the result where these are larger, on each channel in floating point:
    rounded to 8 bits only in the image that comes in. Overshoot is clipped.
    """

    def channel(x_hw: np.ndarray) -> np.ndarray:
        image = Image.fromarray(x_hw.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
        return np.asarray(image).clip(0, 255)

    def one(x_hwC: np.ndarray) -> np.ndarray:
        return np.stack([channel(x_hwC[..., i]) for i in range(x_hwC.shape[-1])], axis=-1)

    with ThreadPoolExecutor(_THREADS) as pool:
        return np.stack(list(pool.map(one, images_BhwC)))


def resize_legacy(images_BhwC: np.ndarray, side: int) -> np.ndarray:
    """Images, uint8 -> [B, side, side, C] float32 in [0, 255], as pytorch-fid's `F.interpolate` resizes.

    Between the four pixels around each point, however far apart points are: `align_corners=False`, no antialiasing.
    """
    x_BhwC: Any = images_BhwC.astype(np.float32)
    for axis in (1, 2):
        size = x_BhwC.shape[axis]
        place = np.maximum((np.arange(side, dtype=np.float32) + 0.5) * np.float32(size / side) - 0.5, 0)
        first = np.minimum(place.astype(np.int64), size - 1)
        second = np.minimum(first + 1, size - 1)
        share = (place - first).astype(np.float32).reshape(-1, *(1,) * (3 - axis))
        x_BhwC = np.take(x_BhwC, first, axis) * (1 - share) + np.take(x_BhwC, second, axis) * share
    return x_BhwC


def for_inception(images_BhwC: np.ndarray, side: int, resize: str) -> np.ndarray:
    """Images [B, h, w, 3 or 1] uint8 -> [B, side, side, 3] float32, about [-1, 1], as InceptionV3 sees them.

    Each convention also has its own scale: clean-fid takes (x - 128) / 128, pytorch-fid 2 x / 255 - 1.

    Raises:
      ValueError: `resize` is none of `RESIZES`, or the images are of another kind.
    """
    if resize not in RESIZES:
        raise ValueError(f"resize is {resize!r}, but must be one of {', '.join(RESIZES)}")
    shape = (len(to_rgb(images_BhwC)), side, side, 3)
    if resize == "clean":
        return np.broadcast_to((resize_clean(images_BhwC, side) - 128) / 128, shape)
    return np.broadcast_to(resize_legacy(images_BhwC, side) * np.float32(2 / 255) - 1, shape)


def for_clip(images: Sequence[np.ndarray] | np.ndarray, side: int = 224) -> np.ndarray:
    """Images [h, w, 3 or 1] uint8, of any sizes -> [B, side, side, 3] float32, as CLIP sees them.

    As `CLIPImageProcessor` of transformers on PIL: the shorter side is resized to `side` (bicubic, 8 bits), the middle
    is cut out, and pixels in [0, 1] are normalised by `CLIP_MEAN` and `CLIP_STD`.

    Raises:
      ValueError: images are of another kind.
    """

    def one(pixels_hwC: np.ndarray) -> np.ndarray:
        (rgb_hwC,) = to_rgb(np.asarray(pixels_hwC)[None])
        short = min(rgb_hwC.shape[:2])
        height, width = (int(side * size / short) for size in rgb_hwC.shape[:2])
        image = Image.fromarray(np.ascontiguousarray(rgb_hwC)).resize((width, height), Image.Resampling.BICUBIC)
        top, left = (height - side) // 2, (width - side) // 2
        return np.asarray(image.crop((left, top, left + side, top + side)))

    with ThreadPoolExecutor(_THREADS) as pool:
        pixels_BhwC = np.stack(list(pool.map(one, images)))
    return (pixels_BhwC.astype(np.float32) / 255 - CLIP_MEAN) / CLIP_STD
