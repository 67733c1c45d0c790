"""The work of `sample`: a model's images in batches, into files, with what it cost."""

import io
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from shortcut_jax.cluster.distributed import say
from shortcut_jax.core.text import count_label
from shortcut_jax.data.images import MAX_BYTES, BadImage, decode, fit
from shortcut_jax.errors import UsageError
from shortcut_jax.inference.image_files import IMAGE, Output, layout_of
from shortcut_jax.inference.request import ImagePipeline, SampleRequest, grid_times, record
from shortcut_jax.runtime.compilation_cache import CompileClock


def sample_to_files(
    model: ImagePipeline, request: SampleRequest, output: Output, trajectory: bool = False
) -> list[Path]:
    """Samples or edits what is asked for and writes it; returns the files of a folder.

    With `trajectory` every image is accompanied by what each step aimed at.
    """
    rows, size, written = request.rows, model.rounded(request.batch_size), list[Path]()
    times = grid_times(model, request) if trajectory else []
    draw = model.trajectories if trajectory else model.images
    starts = range(0, len(rows), size)
    spent = 0.0
    with CompileClock() as clock:
        for first in tqdm(starts, unit="batch", disable=len(starts) == 1):
            begin = time.perf_counter()
            chunk = rows[first : first + size]
            drawn = draw(chunk, request)
            spent += time.perf_counter() - begin
            records = [record(model, row, request) for row in chunk]
            along = drawn if trajectory else None
            written += output.add(drawn[:, -1] if trajectory else drawn, records, along, times)
    output.close(request.edit.pixels_hwc if request.edit else None)
    if clock.programs:
        say(f"{clock}: the next images of this kind need none of it")
    rate = len(rows) / max(spent - clock.seconds, 1e-9)
    how = "" if request.method == "euler" else f" by {request.method}"
    say(
        f"{count_label(len(rows), 'image')} of {model.title(request)} in {count_label(request.steps)}{how}, "
        f"{rate:.3g} images/s without compiling, {size} at once: {output.target}"
    )
    return written


def read_edited(path: str, name: str = "--edit") -> Image.Image:
    """The image to edit, 8-bit RGB; `name` is what an error calls it.

    Raises:
      UsageError: it cannot be read, or is a sheet of several or a trajectory, as its metadata says.
    """
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        opened = decode(data)
    except OSError as error:
        raise UsageError(f"{name}={path} cannot be read: {error.strerror}") from error
    except BadImage as error:
        raise UsageError(f"{name}={path} cannot be read as an image: {error}") from error
    with Image.open(io.BytesIO(data)) as image:
        layout = layout_of(image)
    if layout != IMAGE:
        raise UsageError(
            f"{name}={path} is a {layout} of several images, but one is edited: sample it alone (--num=1), or take one "
            "from a folder (--out=samples/)"
        )
    return opened


def fit_image(model: ImagePipeline, image: Image.Image, request: SampleRequest) -> np.ndarray:
    """Its pixels [h, w, c], uint8, of a size that the model makes: resized to cover it, and cut to its middle."""
    height, width, channels = model.image_size(image.height, image.width, request)
    pixels, _ = fit(image, (height, width))
    if (image.height, image.width) != (height, width):
        say(f"the image of {image.height} x {image.width} is resized and cut to {height} x {width}")
    return np.asarray(Image.fromarray(pixels).convert("L"))[..., None] if channels == 1 else pixels
