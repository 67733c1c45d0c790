"""What the files of `compare_objectives` show: a Markdown table, a page of tables and curves, an image."""

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from shortcut_jax.core.text import count_label, markdown
from shortcut_jax.evaluation.page import (
    Metric,
    best_rows,
    definitions,
    embedded_image,
    metrics_of,
    page,
    quality_plot,
    section,
    table,
)
from shortcut_jax.runtime.metrics import contact_sheet

STEPS = (1, 2, 3, 4, 8, 32)
"""Sampling step counts of every table."""

FIGURES = ("frechet_distance", "frechet_distance_pixels", "accuracy", "precision", "recall")
"""Of a cell; not every set has each of them."""

TUNING_SEED = 100
"""Of runs that settings were chosen by: no other table has it."""


class Row(NamedTuple):
    """All runs of one method.

    Attributes:
      label: of the method, and how it was varied.
      records: one a training seed.
    """

    label: str
    records: list[dict[str, Any]]

    @property
    def title(self) -> str:
        """With the number of its seeds."""
        return f"{self.label}, {count_label(len(self.records), 'seed')}"

    def values(self, figure: str, steps: int) -> list[float]:
        """A figure at a step count, one a seed; none where it was not measured."""
        cells = [cell for record in self.records for cell in record["cells"] if cell["steps"] == steps]
        return [cell[figure] for cell in cells if figure in cell]


def rows_of(records: Sequence[dict[str, Any]], methods: Sequence[str], tuning: bool) -> list[Row]:
    """The rows of the tuning seed or of all others, in the order of `methods`, variants of one after it."""
    chosen = [r for r in records if (r["seed"] == TUNING_SEED) == tuning]
    place = lambda label: (methods.index(label.split(" ")[0]), label)
    labels = sorted({record["method"] for record in chosen}, key=place)
    return [Row(label, [record for record in chosen if record["method"] == label]) for label in labels]


def mean_and_range(values: Sequence[float]) -> str:
    """In three digits after the point; the range where there is one."""
    spread = f" [{min(values):.3f}, {max(values):.3f}]" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def mean_and_spread(values: Sequence[float]) -> str:
    """The same, shorter: half the distance of the extremes."""
    spread = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def figures_of(rows: Sequence[Row]) -> list[str]:
    """The figures that any of the rows has."""
    return [figure for figure in FIGURES if any(row.values(figure, n) for row in rows for n in STEPS)]


def markdown_table(rows: Sequence[Row]) -> str:
    """A row a method and figure: its mean over the training seeds and their range."""
    lines = []
    for figure in figures_of(rows):
        for row in rows:
            found = [row.values(figure, n) for n in STEPS]
            if all(found):
                lines.append([row.title, figure.replace("_", " "), *map(mean_and_range, found)])
    return markdown([["method", "figure", *map(count_label, STEPS)], *lines])


def html_table(rows: Sequence[Row], metric: Metric, figure: str) -> str:
    """The same as HTML; what is within two standard errors of the best of a column is marked."""
    rows = [row for row in rows if all(row.values(figure, n) for n in STEPS)]
    body = [[row.title, *(mean_and_spread(row.values(figure, n)) for n in STEPS)] for row in rows]
    marked = set()
    for j, n in enumerate(STEPS, 1):
        found = [row.values(figure, n) for row in rows]
        marked |= {(i, j) for i in best_rows([*map(statistics.fmean, found)], [*map(_error, found)], metric.best)}
    return table(["method", *map(count_label, STEPS)], body, metric.title, marked)


def _error(values: Sequence[float]) -> float | None:
    """The standard error of a mean; None for one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def curves(rows: Sequence[Row], metric: Metric, figure: str) -> str:
    """The means against sampling steps."""
    points = [
        {"label": row.label, "steps": n, metric.key: statistics.fmean(row.values(figure, n))}
        for row in rows
        for n in STEPS
        if row.values(figure, n)
    ]
    return quality_plot(points, metric)


def sheet(rows: Sequence[Row], folder: Path, steps: int) -> Image.Image | None:
    """The images of the lowest training seed of each row, one below the other; None where there are none."""
    images, labels = [], []
    for row in rows:
        seed = min(record["seed"] for record in row.records)
        path = folder / f"{steps}-{row.label.replace(' ', '-')}-seed{seed}.png"
        if not path.exists():
            continue
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        size = pixels.shape[0] // len(STEPS)
        for n, line in zip(STEPS, pixels.reshape(len(STEPS), size, *pixels.shape[1:]), strict=True):
            images.append(np.stack(np.split(line, line.shape[1] // size, axis=1)))
            labels.append(f"{row.label}, {count_label(n)}")
    known = next((record["captions"] for row in rows for record in row.records if "captions" in record), [])
    return contact_sheet(images, labels, [caption.split()[-1] for caption in known]) if images else None


def to_html(name: str, steps: int, rows: Sequence[Row], tuned: Sequence[Row], drawn: Image.Image | None) -> str:
    """The page of a set."""

    def tables(of: Sequence[Row]) -> Iterator[str]:
        for metric in metrics_of("Frechet distance"):
            figure = {"distance": "frechet_distance", "pixel_distance": "frechet_distance_pixels"}.get(metric.key)
            if (figure or metric.key) in figures_of(of):
                yield html_table(of, metric, figure or metric.key)

    plain = [row for row in rows if " " not in row.label]
    metric, *_ = metrics_of("Frechet distance")
    sections = [
        section("Objectives", *([curves(plain, metric, "frechet_distance")] if plain else []), *tables(plain)),
        section("Variants", *tables([row for row in rows if " " in row.label])),
        section(f"Tuning, on training seed {TUNING_SEED} alone", *tables(tuned)),
    ]
    if drawn is not None:
        sections.append(
            section("The same captions and noise", embedded_image(drawn, "images of each method and step count"))
        )
    commands = {row.title: row.records[0]["command"] for row in (*rows, *tuned)}
    sections.append(section("Commands of the first seeds", definitions(commands)))
    records = [record for row in (*rows, *tuned) for record in row.records]
    facts = {
        "distance": records[0]["facts"].get("distance", ""),
        "reference": records[0]["facts"].get("reference", ""),
        "noise": records[0]["facts"].get("noise", ""),
        "made": " to ".join(dict.fromkeys((min(r["date"] for r in records), max(r["date"] for r in records)))),
        "cells": "mean over training seeds ± half their range; marked: within two standard errors of the best",
    }
    shown = [part for part in sections if "<table" in part or "<img" in part or "<dl" in part]
    return page(f"Objectives on {name}", f"{steps:,} training steps; slow EMA", facts, shown)


def write(records: Sequence[dict[str, Any]], methods: Sequence[str], folder: Path, out: Path) -> list[Path]:
    """Writes SET-STEPS.html and .png into `out`; what was written.

    Args:
      records: of one set and number of training steps.
      methods: the order of the rows.
      folder: where the images of the runs are.
      out: folder to write.
    """
    if not records:
        return []
    name, steps = records[0]["set"], records[0]["steps"]
    rows, tuned = (rows_of(records, methods, tuning) for tuning in (False, True))
    drawn = sheet([row for row in rows if " " not in row.label], folder, steps)
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"{name}-{steps}"
    stem.with_suffix(".html").write_text(to_html(name, steps, rows, tuned, drawn), "utf-8")
    if drawn is None:
        return [stem.with_suffix(".html")]
    drawn.save(stem.with_suffix(".png"))
    return [stem.with_suffix(".html"), stem.with_suffix(".png")]
