"""From tallies to figures: distances to the real pictures, to the teacher, and what goes with them."""

from typing import Any, NamedTuple

import numpy as np

from shortcut_jax.core.stats import frechet_distance, gaussian_of, kernel_distance, precision_recall
from shortcut_jax.evaluation.features import Features
from shortcut_jax.evaluation.reference import Reference
from shortcut_jax.evaluation.tally import Tally
from shortcut_jax.report import count_label

SUBSET, NEIGHBOURS = 1000, 3
"""Of KID, and of precision and recall, as usual."""


class Cell(NamedTuple):
    """One set of weights at one step count.

    Attributes:
      label: of the weights, among all that are judged.
      steps: sampling steps.
      images: pictures.
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
    result["few_images"] = cell.images <= features.size
    result |= dict.fromkeys(("kid", "kid_std", "precision", "recall"))
    fake = tally.reservoir.features_SF
    if reference.features is not None and min(len(fake), len(reference.features)) > NEIGHBOURS:
        size = min(SUBSET, len(fake), len(reference.features))
        result["kid"], result["kid_std"] = kernel_distance(reference.features, fake, subset_size=size)
        result["precision"], result["recall"], *_ = precision_recall(reference.features, fake, NEIGHBOURS)
    ratio = lambda part, whole: tally.sums[part] / tally.sums[whole] if tally.sums[whole] else None
    result["accuracy"], result["clip_score"] = ratio("classified", "labelled"), ratio("clip", "captioned")
    result["images_per_second"] = cell.images / tally.sums["seconds"]
    return result


def against_teacher(row: dict[str, Any], tally: Tally, teacher: dict[str, Any], of_teacher: Tally) -> dict[str, Any]:
    """A row with `abs_gap`, |distance - the teacher's distance|, and `to_teacher`, the distance between the two."""
    between = frechet_distance(gaussian_of(tally.moments), gaussian_of(of_teacher.moments))
    return {**row, "abs_gap": abs(row["distance"] - teacher["distance"]), "to_teacher": between}


def public_names(row: dict[str, Any], distance: str) -> dict[str, Any]:
    """A row as it is written: a Frechet distance is called FID only where it is of Inception's features."""
    fid = distance == "FID"
    names = {
        "distance": "fid" if fid else "frechet_distance",
        "abs_gap": "abs_fid_gap" if fid else "abs_frechet_gap",
        "to_teacher": "fid_to_teacher" if fid else "frechet_to_teacher",
    }
    return {names.get(k, k): float(v) if isinstance(v, np.floating) else v for k, v in row.items()}
