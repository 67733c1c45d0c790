"""The files of an evaluation: `evaluation.json`, TensorBoard's scalars, `evaluation.html`."""

from pathlib import Path

import jax

from shortcut_jax.cluster.distributed import say
from shortcut_jax.core.json_text import to_json
from shortcut_jax.core.text import count_label
from shortcut_jax.evaluation.metrics import public_names
from shortcut_jax.evaluation.page import (
    column,
    embedded_image,
    error_key,
    known,
    metric_table,
    metrics_of,
    page,
    path_section,
    quality_plot,
    section,
    table,
)
from shortcut_jax.evaluation.run import Result
from shortcut_jax.runtime.metrics import add_config


def write(result: Result, out: Path) -> None:
    """Writes all files, from process 0, and says where they are."""
    if jax.process_index() > 0:
        return
    rows = [public_names(row, result.distance) for row in result.rows]
    record = {
        "title": result.title,
        "facts": result.facts,
        "distance": result.distance,
        "cells": rows,
        "paths": {"times": result.times, **result.paths},
        "validation": result.validation,
        "latency_seconds": result.latency,
    }
    (out / "evaluation.json").write_text(to_json(record, indent=2) + "\n")
    _tensorboard(result, rows, out)
    (out / "evaluation.html").write_text(to_html(result), "utf-8")
    say(f"page     {out / 'evaluation.html'}\nnumbers  {out / 'evaluation.json'}")


def _tensorboard(result: Result, rows: list[dict], out: Path) -> None:
    """A run of TensorBoard for each set of weights, so that a tag is a figure, its curves the weights, and x the steps.

    The events of an earlier evaluation go: it would be drawn over by this one.
    """
    from tensorboardX import SummaryWriter

    for label in dict.fromkeys([*(row["label"] for row in rows), *result.validation]):
        of_label = [row for row in rows if row["label"] == label]
        folder = out / "tensorboard" / label.replace("/", "-")
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        with SummaryWriter(str(folder)) as writer:
            figures = {"steps", "images", "label", "few_images"}
            tags = {k for row in of_label for k, v in row.items() if k not in figures and isinstance(v, float)}
            for row in of_label:
                for name in sorted(tags):
                    if row.get(name) is not None:
                        writer.add_scalar(f"evaluation/{name}", row[name], row["steps"])
            for name, value in result.validation.get(label, {}).items():
                writer.add_scalar(f"evaluation/{name}", value, result.steps.get(label, 0))
            known_by = {"weights": label, "training step": result.steps.get(label), **result.facts}
            add_config(writer, "evaluation", known_by, [f"evaluation/{name}" for name in sorted(tags)])


def to_html(result: Result) -> str:
    """The page."""
    metrics = [m for m in metrics_of(result.distance) if known(result.rows, m.key)]
    tables = [metric_table(result.rows, metric) for metric in metrics]
    notes = []
    if any(row["few_images"] for row in result.rows):
        notes.append(
            '<p class="warn">* fewer images than features: the covariance is singular and the distance is biased '
            "upwards; compare cells of equal counts only.</p>"
        )
    notes.append(
        "<p>A Frechet distance from fewer images is biased upwards; KID is not. KID, precision and recall come from "
        "a fixed sample of at most 10,000 features.</p>"
    )
    if any(row.get(error_key(m)) is not None for row in result.rows for m in metrics):
        notes.append(
            "<p>± is a standard error: what other noise would change a figure by (that of KID is scaled "
            "from the deviation between its subsets, kid_std in evaluation.json, to all samples). Marked are the cells "
            "that may be the best of their column, those within two standard errors of it; none where that is all of "
            "them.</p>"
        )
    plots = "".join(quality_plot(result.rows, m) for m in metrics if m.key not in ("images_per_second", "kid"))
    quality = f"<div class=pair>{''.join(tables)}</div>"
    curves = f"<div class=pair>{plots}</div>"
    sections = [section("Quality", quality, *notes), section("Quality against steps", curves)]
    for label, sheet in result.sheets.items():
        title = f"Samples of {label}: the same noise down each column"
        sections.append(section(title, embedded_image(sheet, title)))
    if result.paths:
        sections.append(section("How straight the field is", path_section(result.paths, result.times)))
    if result.validation:
        sections.append(section("Validation loss", _losses(result.validation)))
    if result.latency:
        sections.append(section("Latency", _latency(result.latency)))
    return page(f"Evaluation of {result.title}", "shortcut_jax evaluation", result.facts, sections)


def _losses(validation: dict[str, dict[str, float]]) -> str:
    names = list(dict.fromkeys(name for losses in validation.values() for name in losses))
    columns = [column([losses.get(name) for losses in validation.values()], 4) for name in names]
    body = [[label, *row] for label, row in zip(validation, zip(*columns, strict=True), strict=True)]
    short = [name.rpartition("/")[2] for name in names]
    text = "Flow matching at fixed times with fixed noise, mean and by time (mlperf: 0, 1/8 ... 7/8, as the benchmark)."
    return f"<p>{text}</p>" + table(["weights", *short], body)


def _latency(latency: dict[str, dict[int, float]]) -> str:
    steps = sorted({n for times in latency.values() for n in times})
    milliseconds = lambda n: [None if n not in times else 1000 * times[n] for times in latency.values()]
    columns = [column(milliseconds(n), unit=" ms") for n in steps]
    body = [[label, *row] for label, row in zip(latency, zip(*columns, strict=True), strict=True)]
    text = "Time of one image alone, encoding and decoding included, without compilation; median of 3."
    return f"<p>{text}</p>" + table(["weights", *map(count_label, steps)], body)
