"""Judging a model of small images: Frechet distance in pixel space, caption accuracy, sample grids, as a table."""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shortcut_jax.core.stats import Gaussian, fit_gaussian, frechet_distance
from shortcut_jax.core.text import count_label, markdown
from shortcut_jax.data.pipeline import evenly, read_many
from shortcut_jax.data.records import to_latents, with_images
from shortcut_jax.data.training import TrainingData
from shortcut_jax.evaluation.captions import CaptionedSet
from shortcut_jax.evaluation.features import MAX_PIXELS
from shortcut_jax.inference.generator import Generator

MOST_RECORDS = 10_000
"""Of a set that samples are judged against, evenly spread over it: it is held in memory."""
EVALUATE = "python -m shortcut_jax.evaluate judges such runs"


class Reference(NamedTuple):
    """The real data that samples are judged against.

    Attributes:
      gaussian: of the pixels in [-1, 1].
      captions: one an image, in storage order.
      labels: class of each image, where the data has classes.
      classify: pixels [S, h, w, c] uint8 -> classes [S], where it has.
    """

    gaussian: Gaussian
    captions: list[str]
    labels: np.ndarray | None = None
    classify: Callable[[np.ndarray], np.ndarray] | None = None


class Score(NamedTuple):
    """One cell of the table: a view at a step count, over the noise seeds.

    Attributes:
      view: the weights.
      steps: sampling steps.
      images: images judged for each seed.
      distances: Frechet distance to the data, one a seed.
      accuracies: share of images whose class is the caption's, one a seed; none where the data has no classes.
    """

    view: str
    steps: int
    images: int
    distances: tuple[float, ...]
    accuracies: tuple[float, ...]


def make_reference(source: Sequence[dict[str, Any]]) -> Reference:
    """Statistics of a data set with `image` and `caption`, and a classifier fitted on its `label`, if it has that.

    The classifier is scikit-learn's support vector machine with the settings of its own digits example.
    """
    images = np.stack([record["image"] for record in source])
    captions = [record["caption"].decode("utf-8") for record in source]
    gaussian = fit_gaussian(to_latents(images))
    if "label" not in source[0]:
        return Reference(gaussian, captions)
    from sklearn.svm import SVC

    labels = np.array([record["label"] for record in source])
    features = lambda pixels: pixels.reshape(len(pixels), -1) * (16.0 / 255.0)
    classifier = SVC(gamma=0.001).fit(features(images), labels)
    classify = lambda pixels: classifier.predict(features(pixels))
    return Reference(gaussian, captions, labels, classify)


def classifier(own: CaptionedSet | None) -> Callable[[np.ndarray], np.ndarray] | None:
    """Images -> classes, fitted on a training set where it has labels; see `make_reference`."""
    if own is None or "label" not in own.records[0]:
        return None
    return make_reference(read_many(own.records, evenly(len(own.records), MOST_RECORDS))).classify


def reference_of(data: TrainingData) -> Reference | str:
    """What samples of a run on `data` are judged against: its first set, the images of the size that is sampled.

    Returns:
      the statistics, or in words why there are none.
    """
    if data.settings.store == "captions":
        settings = with_images(data.settings)
        return f"there are captions alone; {EVALUATE}" if settings is None else reference_of(TrainingData(settings))
    first, size = data.sets[0], (data.settings.height, data.settings.width)
    if data.settings.store != "pixels":
        return f"the data set holds latents, not pixels; {EVALUATE}"
    places = data.places[data.buckets.index(size)][0] if first.prepared else np.arange(len(first.records))
    if len(places) < 2:
        return f"the data set has {len(places)} images of {size[0]} x {size[1]}, but a distance needs 2"
    values = np.asarray(first.records[int(places[0])]["image"]).size
    if values > MAX_PIXELS:
        return (
            f"images of {values:,} values are too large for a distance in pixels (at most {MAX_PIXELS:,}); {EVALUATE}"
        )
    return make_reference(read_many(first.records, [int(places[i]) for i in evenly(len(places), MOST_RECORDS)]))


def score(
    generate: Callable[..., np.ndarray],
    params: Any,
    view: str,
    num_steps: int,
    reference: Reference,
    num_images: int,
    seeds: Sequence[int],
) -> Score:
    """Judges one view at one step count on the captions of `num_images` records (0: all), evenly spread."""
    total = len(reference.captions)
    picks = evenly(total, num_images or total)
    captions = [reference.captions[i] for i in picks]
    distances, accuracies = [], []
    for seed in seeds:
        images = generate(params, captions, num_steps, seed=seed)
        distances.append(frechet_distance(fit_gaussian(to_latents(images)), reference.gaussian))
        if reference.classify is not None and reference.labels is not None:
            accuracies.append(float(np.mean(reference.classify(images) == reference.labels[picks])))
    return Score(view, num_steps, len(picks), tuple(distances), tuple(accuracies))


def table(scores: Sequence[Score]) -> str:
    """Scores as a Markdown table: a row a view, a column a step count, `distance / accuracy` (see `cell`) in each.

    With several seeds a cell gives means, and half the distance between the extremes behind +-.
    """
    counts = sorted({s.steps for s in scores})
    rows = [["view (images)", *map(count_label, counts)]]
    for view in dict.fromkeys(s.view for s in scores):
        cells = {s.steps: s for s in scores if s.view == view}
        images = next(iter(cells.values())).images
        rows.append([f"{view} ({images})", *(cell(cells[n]) for n in counts)])
    return markdown(rows)


def cell(s: Score) -> str:
    """`distance / accuracy`: means, and behind +- half the distance of the extremes where there are several seeds.

    The distance alone where the data has no classes.
    """
    spread = f" ±{(max(s.distances) - min(s.distances)) / 2:.2f}" if len(s.distances) > 1 else ""
    accuracy = f" / {np.mean(s.accuracies):.3f}" if s.accuracies else ""
    return f"{np.mean(s.distances):.2f}{spread}{accuracy}"


def measures(scores: Sequence[Score]) -> str:
    """What is in the cells, in words."""
    return f"Frechet distance{' / caption accuracy' if any(s.accuracies for s in scores) else ''}"


def judge(
    generator: Generator,
    views: dict[str, Any],
    images: Sequence[int],
    steps: Sequence[int],
    seeds: Sequence[int],
    guidance: float,
    reference: Reference,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Score]:
    """Scores of every view at every step count, telling of each as it is done."""
    generate = functools.partial(generator, guidance=guidance)
    scores = []
    for (view, params), num in zip(views.items(), images, strict=True):
        for n in steps:
            begin = time.perf_counter()
            scores.append(score(generate, params, view, n, reference, num, seeds))
            took = time.perf_counter() - begin
            progress(f"{view} at {count_label(n)}: {measures(scores[-1:])} {cell(scores[-1])} ({took:.0f} s)")
    return scores


def explained(scores: Sequence[Score]) -> str:
    """How the cells of a table were measured."""
    seeds = len(scores[0].distances)
    accuracy = " / share of images that a support vector machine fitted on the real images assigns to their caption"
    return (
        "Each cell: squared Frechet distance to the data in pixel space (pixels in [-1, 1])"
        f"{accuracy if scores[0].accuracies else ''}; {seeds} noise seed"
        f"{'s: means, and half the distance of the extremes' if seeds > 1 else ''}. A distance from fewer images is "
        "biased upwards: compare rows of equal counts."
    )


def write_report(
    path: Path,
    title: str,
    scores: Sequence[Score],
    facts: dict[str, Any],
    times: str,
    images: Sequence[str],
    unjudged: str = "",
) -> None:
    """Writes `report.md`: the table, how it was measured, where the time went, the images.

    Without scores `unjudged` says why there is no table.
    """
    lines = [
        f"# {title}",
        "",
        *([table(scores), "", explained(scores)] if scores else [f"No table: {unjudged}."]),
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        "Where the time went:",
        "",
        "```",
        times,
        "```",
        "",
        *(f"![{name}]({name})\n" for name in images),
    ]
    path.write_text("\n".join(lines))
