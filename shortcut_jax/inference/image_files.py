"""Sampled images as files, with what they were made by in the metadata of each PNG.

Two text chunks: `parameters`, for people and the programs that read what AUTOMATIC1111's web UI writes, and
`shortcut_jax`, JSON from which the same pixels can be sampled again (`read_records`), and which says whether the file
is one image, a sheet of several or a trajectory (`layout_of`).
"""

import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from shortcut_jax.cluster.distributed import say
from shortcut_jax.cluster.shared_folder import check_place
from shortcut_jax.errors import UsageError
from shortcut_jax.runtime.metrics import contact_sheet

CHUNK = "shortcut_jax"
IMAGE, SHEET, TRAJECTORY = "image", "sheet", "trajectory"
"""What a file shows, as its metadata says."""
ENDINGS = (".png", ".jpg", ".webp")
_THUMBNAIL = 256
"""Pixels of the longer side of an image on the sheet of a folder."""

Record = dict[str, Any]
"""What one image was made by; see `request.record`."""


def parameters(records: Sequence[Record]) -> str:
    """The prompts, then the settings of the first record in one line, as AUTOMATIC1111's web UI writes them."""
    first = records[0]
    shown = {
        "Steps": first["steps"],
        "Sampler": first["method"].capitalize(),
        "CFG scale": first["guidance"],
        "Seed": first["seed"],
        "Size": f"{first['width']}x{first['height']}",
        "Model": first["model"],
        "Shift": first["shift"],
        "Pictures": len(records) if len(records) > 1 else None,
        "Version": f"shortcut_jax {first['version']}",
    }
    quoted = lambda value: json.dumps(value) if isinstance(value, str) and set(value) & set(',:\n"') else value
    line = ", ".join(f"{name}: {quoted(value)}" for name, value in shown.items() if value is not None)
    return "\n".join([*dict.fromkeys(r["prompt"] for r in records), line])


def save_image(path: Path, image: Image.Image, records: Sequence[Record], layout: str = IMAGE) -> None:
    """Writes an image; a PNG with the records of what is on it. Of several processes only the first one writes."""
    if jax.process_index() != 0:
        return
    if path.suffix.lower() != ".png":
        image.save(path)
        return
    info = PngInfo()
    info.add_text("parameters", parameters(records))
    info.add_text(CHUNK, json.dumps({"layout": layout, "pictures": list(records)}))
    image.save(path, pnginfo=info)


def read_records(path: str | Path) -> list[Record]:
    """What the images in a PNG were made by.

    Raises:
      UsageError: it is no image, or has no such metadata.
    """
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(CHUNK)
    except OSError as error:
        raise UsageError(f"{path} cannot be read as an image: {error}") from error
    if text is None:
        raise UsageError(f"{path} does not say how it was made: it has no {CHUNK!r} in its metadata")
    return list(json.loads(text)["pictures"])


def layout_of(image: Image.Image) -> str:
    """What an opened PNG shows, as far as its metadata says: one image, a sheet or a trajectory.

    Files written before they said so tell it by their records: several of them, or one of another size.
    """
    chunks: dict[str, str] = getattr(image, "text", {})
    try:
        told = json.loads(chunks[CHUNK])
        if told.get("layout") in (IMAGE, SHEET, TRAJECTORY):
            return str(told["layout"])
        sizes = [(r["width"], r["height"]) for r in told["pictures"]]
        return IMAGE if sizes in ([], [image.size]) else SHEET
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):  # edited, or of other software
        return SHEET if re.search(r"Images: \d+, Version: shortcut_jax", chunks.get("parameters", "")) else IMAGE


def to_image(pixels_hwc: np.ndarray) -> Image.Image:
    """Pixels [h, w, 1 or 3], uint8."""
    return Image.fromarray(pixels_hwc[..., 0] if pixels_hwc.shape[-1] == 1 else pixels_hwc)


def strip(path_Shwc: Sequence[np.ndarray], labels: Sequence[str], times: Sequence[float]) -> Image.Image:
    """Trajectories, one a row: what each step aims at, and the result."""
    return contact_sheet(path_Shwc, labels, [*(f"t = {t:.3g}" for t in times), "result"])


def names_folder(target: str) -> bool:
    """Whether an `--out` means a folder: it ends in a slash, is one or has no ending."""
    path = Path(target).expanduser()
    return target.endswith("/") or path.is_dir() or not path.suffix


class Output:
    """Where images go: `folder/` gets a file each and a sheet of all; `x.png` is an image, or a sheet of several.

    Attributes:
      target: as the user named it.
    """

    def __init__(self, target: str, count_on: bool = False):
        """Checks the target, and makes the folder.

        Args:
          target: a folder if it ends in a slash, is one or has no ending; else a file.
          count_on: whether numbers in a folder go on behind those that are there; else they start at 0.

        Raises:
          UsageError: nothing can be written there.
        """
        self.target, self._path = target, Path(target).expanduser()
        self.is_folder = names_folder(target)
        if self.is_folder:
            try:
                self._path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"--out={target}: the folder cannot be made: {error.strerror}") from error
        elif self._path.suffix.lower() not in ENDINGS:
            raise UsageError(f"--out={target}: end it in .png, .jpg or .webp, or in / for a folder")
        elif not self._path.absolute().parent.is_dir():
            raise UsageError(f"--out={target}: the folder {self._path.parent} is not found")
        check_place(self._path, "--out", folder=self.is_folder)
        taken = [int(p.stem) for p in self._path.glob("*.png") if p.stem.isdecimal()] if count_on else []
        self._next = max(taken, default=-1) + 1
        self._kept: list[tuple[np.ndarray, Record]] = []
        self._strips: list[tuple[np.ndarray, Record]] = []

    def add(
        self, images: np.ndarray, records: Sequence[Record], along: np.ndarray | None = None, times: Any = ()
    ) -> list[Path]:
        """Takes images [B, h, w, c] and their trajectories [B, S + 1, h, w, c]; returns what was written at once."""
        self._times, written = times, []
        for i, (pixels, record) in enumerate(zip(images, records, strict=True)):
            if not self.is_folder:
                self._kept.append((pixels, record))
                self._strips += [] if along is None else [(along[i], record)]
                continue
            path = self._path / f"{self._next:05d}.png"
            save_image(path, to_image(pixels), [record])
            written.append(path)
            if along is not None:
                path = path.with_stem(f"{path.stem}_trajectory")
                save_image(path, strip([along[i]], [shown(record["prompt"])], times), [record], TRAJECTORY)
                written.append(path)
            self._kept.append((thumbnail(pixels), record))
            self._next += 1
        return written

    def close(self, source: np.ndarray | None = None) -> None:
        """Writes the file, or the folder's sheet; `source` is an image to show at their beginning, as it is."""
        records = [record for _, record in self._kept]
        by_prompt: dict[str, list[np.ndarray]] = {}
        for pixels, record in self._kept:
            by_prompt.setdefault(record["prompt"], []).append(pixels)
        rows, labels = [np.stack(row) for row in by_prompt.values()], [shown(prompt) for prompt in by_prompt]
        if source is not None:
            rows.insert(0, (thumbnail(source) if self.is_folder else source)[None])
            labels.insert(0, "source")
        sheet = lambda: contact_sheet(rows, labels)
        if self.is_folder:
            save_image(self._path / "sheet.png", sheet(), records, SHEET)
            return
        if len(records) == 1:
            save_image(self._path, to_image(self._kept[0][0]), records)
        else:
            save_image(self._path, sheet(), records, SHEET)
        if self._strips:
            path = self._path.with_stem(f"{self._path.stem}_trajectory")
            paths, marks = zip(*self._strips, strict=True)
            save_image(path, strip(paths, [shown(r["prompt"]) for r in marks], self._times), records, TRAJECTORY)
            say(f"the images along the way: {path}")


def shown(prompt: str) -> str:
    """A prompt as a label."""
    return textwrap.shorten(prompt, 40) or "(empty)"


def thumbnail(pixels_hwc: np.ndarray, side: int = _THUMBNAIL) -> np.ndarray:
    """Pixels [h, w, 1 or 3], uint8, of at most `side` each way."""
    if max(pixels_hwc.shape[:2]) <= side:
        return pixels_hwc
    small = to_image(pixels_hwc)
    small.thumbnail((side, side))
    return np.asarray(small).reshape(small.height, small.width, -1)
