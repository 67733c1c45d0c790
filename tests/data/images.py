"""Small captioned images that tests of preparing share."""

import io
import json

import numpy as np
from PIL import Image


def noise_image(seed=0, height=32, width=32):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(image, form="PNG", **options):
    out = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(out, form, **options)
    return out.getvalue()


def write_folder(folder, images, extra=()):
    """`images`: name -> (bytes, caption); `extra`: further lines."""
    folder.mkdir(parents=True)
    rows = []
    for name, (data, caption) in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if data is not None:
            (folder / name).write_bytes(data)
        rows.append(json.dumps({"file_name": name, "prompt": caption, "kind": "base"}).encode())
    lines = [*rows, *(x if isinstance(x, bytes) else x.encode() for x in extra)]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder


def simple_folder(folder, num=40, height=32, width=32):
    return write_folder(
        folder, {f"p/{i:03d}.png": (encoded(noise_image(i, height, width)), f"image {i}") for i in range(num)}
    )
