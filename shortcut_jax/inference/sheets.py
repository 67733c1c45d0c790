"""Sheets of images: one row a step count, one column a caption."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from shortcut_jax.core.text import count_label
from shortcut_jax.runtime.metrics import contact_sheet


def sample_grid(
    generate: Callable[..., np.ndarray], params: Any, captions: Sequence[str], steps: Sequence[int], guidance: float
) -> Image.Image:
    """A contact sheet, the same noise and caption down each column: a row a step count."""
    rows = [generate(params, captions, n, seed=0, guidance=guidance) for n in steps]
    last_words = [caption.split()[-1] if caption else "" for caption in captions]
    return contact_sheet(rows, [count_label(n) for n in steps], last_words)


def grid_captions(chosen: Sequence[str], reference_captions: Sequence[str], columns: int) -> list[str]:
    """The captions of a sample grid: the chosen ones, or the first different ones of the data set."""
    different = list(chosen) or list(dict.fromkeys(reference_captions))
    return [different[i % len(different)] for i in range(columns)]
