"""Images of the web page as files: what is downloaded, with what it was made by, and what is uploaded."""

import io
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shortcut_jax.data.images import BadImage, decode, fit
from shortcut_jax.errors import RequestError
from shortcut_jax.inference.image_files import IMAGE, Record, layout_of, save_image, to_image
from shortcut_jax.webapp.guard import MAX_UPLOAD

DISPLAYED = 256
"""Pixels that a smaller image is enlarged to, by a whole factor."""


def file_name(record: Record) -> str:
    """Such as `a-red-fox-in-the-snow-seed0-2-steps4.png`, the third image of seed 0."""
    words = re.sub(r"\W+", "-", record["prompt"].lower()).strip("-_")
    number = f"-{record['index']}" if record["index"] else ""
    kind = "-edit" if "source_prompt" in record else ""
    return f"{words[:48].rstrip('-') or 'image'}{kind}-seed{record['seed']}{number}-steps{record['steps']}.png"


def save(folder: Path, pixels_hwc: np.ndarray, record: Record) -> str:
    """Writes an image as it is shown and downloaded, in a folder of its own, and returns its path.

    The metadata is that of `sample`; where the image is enlarged, `enlarged` is the factor.

    Raises:
      RequestError: the folder is gone.
    """
    image = to_image(pixels_hwc)
    factor = max(DISPLAYED // max(image.size), 1)
    if factor > 1:
        size = image.width * factor, image.height * factor
        image, record = image.resize(size, Image.Resampling.NEAREST), {**record, "enlarged": factor}
    try:
        path = Path(tempfile.mkdtemp(prefix="made-", dir=folder)) / file_name(record)
        save_image(path, image, [record])
    except FileNotFoundError as error:
        raise RequestError(
            "the folder of the server's images is gone: it is about to end, or to be restarted"
        ) from error
    return str(path)


def read_upload(folder: Path, value: Any) -> Image.Image:
    """The image that gradio has put into its folder.

    Args:
      folder: of gradio; nothing outside of it is read.
      value: as it was sent, of whatever type.

    Raises:
      RequestError: there is none, or it cannot be read as an image, or it is a sheet or trajectory.
    """
    given = value.get("path") if isinstance(value, dict) else None
    if not isinstance(given, str) or not given:
        raise RequestError("the image is missing: upload the one to edit")
    path = Path(given).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise RequestError("the image is no file that was uploaded here: upload it again")
    with path.open("rb") as file:
        data = file.read(MAX_UPLOAD + 1)
    try:
        image = decode(data)
    except BadImage as error:
        raise RequestError(f"the image cannot be read: {error}") from error
    with Image.open(io.BytesIO(data)) as opened:
        layout = layout_of(opened)
    if layout != IMAGE:
        raise RequestError(f"the image is a {layout} of several: upload one of its images alone")
    return image


def fitted(image: Image.Image, size: tuple[int, int, int]) -> np.ndarray:
    """Pixels [h, w, c], uint8: resized to cover rows x columns, and cut to their middle."""
    *shape, channels = size
    pixels, _ = fit(image, (shape[0], shape[1]))
    return np.asarray(Image.fromarray(pixels).convert("L"))[..., None] if channels == 1 else pixels
