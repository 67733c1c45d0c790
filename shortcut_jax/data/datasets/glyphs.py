"""TFDS builder of letters and digits in the fonts of this machine: 16 x 16 grey images with captions.

What is drawn depends on the fonts that are installed; `docs/objectives.md` names the Debian packages of its tables.
"""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from shortcut_jax.data.datasets.digits import NAMES as DIGITS

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
SIDE = 16
MARGIN = 1
"""Pixels around the tallest and the widest character of a font."""

_SCALE = 8
"""Characters are drawn so many times as large, and averaged over blocks."""


def caption(character: str) -> str:
    """The caption of a character: "the small letter k", "the capital letter K" or "the digit seven"."""
    if character.isdigit():
        return f"the digit {DIGITS[int(character)]}"
    return f"the {'capital' if character.isupper() else 'small'} letter {character.lower()}"


CAPTIONS = tuple(map(caption, CHARACTERS))


def find_fonts() -> list[Path]:
    """The font files of this machine, by name."""
    from matplotlib.font_manager import findSystemFonts

    return sorted(map(Path, findSystemFonts()))


def draw_font(path: Path) -> tuple[str, dict[str, np.ndarray]] | None:
    """A font's name and its characters, bright on dark [16, 16] uint8; None where one of `CHARACTERS` is missing.

    All characters of a font are drawn at one size and on one line, each centred from left to right.
    """
    from matplotlib.ft2font import FT2Font
    from PIL import Image, ImageDraw, ImageFont

    try:
        face = FT2Font(str(path))
        if not set(map(ord, CHARACTERS)) <= set(face.get_charmap()):
            return None
        boxes = lambda font: np.array([font.getbbox(c, anchor="ls") for c in CHARACTERS])
        unit = boxes(ImageFont.truetype(str(path), 100))
        (left, top), (right, bottom) = unit[:, :2].T, unit[:, 2:].T
        room = (SIDE - 2 * MARGIN) * _SCALE
        largest = max(max(bottom) - min(top), max(right - left))
        if largest <= 0 or (right <= left).any() or (bottom <= top).any():  # something is drawn for each
            return None
        font = ImageFont.truetype(str(path), 100 * room / largest)
        placed = boxes(font)
    except (OSError, RuntimeError, ValueError):  # not a font after all, or one that FreeType cannot scale
        return None
    line = (SIDE * _SCALE - max(placed[:, 3]) - min(placed[:, 1])) / 2
    drawn = {}
    for character, (left, _, right, _) in zip(CHARACTERS, placed, strict=True):
        image = Image.new("L", (SIDE * _SCALE, SIDE * _SCALE))
        at = ((SIDE * _SCALE - left - right) / 2, line)
        ImageDraw.Draw(image).text(at, character, fill=255, font=font, anchor="ls")
        blocks = np.asarray(image, np.float32).reshape(SIDE, _SCALE, SIDE, _SCALE)
        drawn[character] = np.round(blocks.mean(axis=(1, 3))).astype(np.uint8)
    return f"{face.family_name} {face.style_name}".strip(), drawn


class Glyphs(tfds.core.GeneratorBasedBuilder):
    """Letters and digits in all fonts that have them; images that are the same in several fonts once."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIDE, SIDE, 1), dtype=np.uint8, encoding_format="png"),
                    "caption": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=list(CHARACTERS)),
                    "font": tfds.features.Text(),
                }
            ),
            description="Letters and digits, drawn with the fonts of the machine that made the set.",
            supervised_keys=None,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        from PIL import Image
        from tqdm import tqdm

        seen = set()
        shown = {"mininterval": 0.1 if sys.stderr.isatty() else 10.0}
        for path in tqdm(find_fonts(), desc="drawing glyphs", unit="font", **shown):
            if (found := draw_font(path)) is None:
                continue
            font, drawn = found
            for label, (character, pixels) in enumerate(drawn.items()):
                key = hashlib.sha256(bytes([label]) + pixels.tobytes()).hexdigest()
                if key not in seen:
                    seen.add(key)
                    image = Image.fromarray(pixels, mode="L")
                    yield key, {"image": image, "caption": caption(character), "label": label, "font": font}
        if not seen:
            raise ValueError(
                "no font of this machine has all letters and digits: install some, for instance "
                "apt-get install fonts-dejavu-core fonts-liberation fonts-lato"
            )
