"""From tallies to figures: distances to the real images, to the teacher, and what goes with them.

Beside a figure `x` stands its standard error `x_std` where one is known: what another seed would change it by. Of KID
`kid_std` is the deviation between its subsets, as the field reports it, and `kid_error` the standard error.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from shortcut_jax.core.stats import (
    Gaussian,
    frechet_distance,
    frechet_error,
    gaussian_of,
    kernel_distance,
    precision_recall,
)
from shortcut_jax.core.text import count_label
from shortcut_jax.evaluation.accumulators import Tally
from shortcut_jax.evaluation.features import Features
from shortcut_jax.evaluation.reference import Reference

SUBSET, NEIGHBOURS = 1000, 3
"""Of KID, and of precision and recall, as usual."""


class Cell(NamedTuple):
    """One set of weights at one step count.

    Attributes:
      label: of the weights, among all that are judged.
      steps: sampling steps.
      images: images.
    """

    label: str
    steps: int
    images: int

    def __str__(self) -> str:
        return f"{self.label} at {count_label(self.steps)}"


def figures(cell: Cell, tally: Tally, reference: Reference, features: Features) -> dict[str, Any]:
    """What is known of a cell by itself; None for what cannot be known."""
    result: dict[str, Any] = {"label": cell.label, "steps": cell.steps, "images": cell.images}
    result["distance"] = frechet_distance(gaussian_of(tally.moments), reference.gaussian)
    result["distance_std"] = _error(tally, reference.gaussian)
    pixels = reference.pixels
    result["pixel_distance"] = frechet_distance(gaussian_of(tally.pixels), pixels) if pixels else None
    result["few_images"] = cell.images <= features.size
    result |= dict.fromkeys(("kid", "kid_std", "kid_error", "precision", "precision_std", "recall"))
    fake = tally.reservoir.features_SF
    if reference.features is not None and min(len(fake), len(reference.features)) > NEIGHBOURS:
        size = min(SUBSET, len(fake), len(reference.features))
        result["kid"], result["kid_std"] = kernel_distance(reference.features, fake, subset_size=size)
        result["kid_error"] = _kid_error(result["kid_std"], size, len(fake))
        result["precision"], result["recall"], *_ = precision_recall(reference.features, fake, NEIGHBOURS)
        result["precision_std"] = _share_error(result["precision"], len(fake))
    ratio = lambda part, whole: tally.sums[part] / tally.sums[whole] if tally.sums[whole] else None
    result["accuracy"], result["clip_score"] = ratio("classified", "labelled"), ratio("clip", "captioned")
    result["accuracy_std"] = _share_error(result["accuracy"], tally.sums["labelled"])
    result["clip_score_std"] = _mean_error(tally.sums["clip"], tally.sums["clip_squares"], tally.sums["captioned"])
    result["images_per_second"] = cell.images / tally.sums["seconds"]
    return result


def against_teacher(row: dict[str, Any], tally: Tally, teacher: dict[str, Any], of_teacher: Tally) -> dict[str, Any]:
    """A row with `abs_gap`, |distance - the teacher's distance|, and `to_teacher`, the distance between the two."""
    own, other = gaussian_of(tally.moments), gaussian_of(of_teacher.moments)
    row = {**row, "abs_gap": abs(row["distance"] - teacher["distance"]), "to_teacher": frechet_distance(own, other)}
    row["abs_gap_std"] = _both(row["distance_std"], teacher["distance_std"])
    row["to_teacher_std"] = _both(_error(tally, other), _error(of_teacher, own))
    return row


def _error(tally: Tally, other: Gaussian) -> float | None:
    """The standard error of the distance to `other`, whose own is not counted."""
    sample = tally.reservoir.features_SF
    error = frechet_error(sample, other)
    return None if error is None else error * math.sqrt(len(sample) / tally.moments.count)


def _kid_error(deviation: float, subset: int, count: int) -> float | None:
    """The standard error of KID from so many samples; None where each subset is all of them, so that none differ.

    Subsets overlap, so the error is not the deviation over the root of their number, which is any that one likes.
    Without replacement, means of `subset` of `count` samples have the variance s^2 (1 / subset - 1 / count), and that
    of all has s^2 / count.
    """
    return None if subset == count else deviation * math.sqrt(subset / (count - subset))


def _both(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else math.hypot(a, b)


def _share_error(share: float | None, count: float) -> float | None:
    """The standard error of a share of so many, not 0 for none or all of few (Agresti and Coull)."""
    if share is None:
        return None
    adjusted = (share * count + 2.0) / (count + 4.0)
    return math.sqrt(adjusted * (1.0 - adjusted) / (count + 4.0))


def _mean_error(total: float, squares: float, count: float) -> float | None:
    if count < 2:
        return None
    return math.sqrt(max(squares - total**2 / count, 0.0) / (count - 1) / count)


def public_names(row: dict[str, Any], distance: str) -> dict[str, Any]:
    """A row as it is written: a Frechet distance is called FID only where it is of Inception's features."""
    fid = distance == "FID"
    names = {
        "distance": "fid" if fid else "frechet_distance",
        "pixel_distance": "frechet_distance_pixels",
        "abs_gap": "abs_fid_gap" if fid else "abs_frechet_gap",
        "to_teacher": "fid_to_teacher" if fid else "frechet_to_teacher",
    }
    names |= {f"{key}_std": f"{name}_std" for key, name in names.items()}
    return {names.get(k, k): float(v) if isinstance(v, np.floating) else v for k, v in row.items()}
