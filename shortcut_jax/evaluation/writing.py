"""The files of an evaluation: `evaluation.json`, TensorBoard's scalars, `evaluation.html`."""

from pathlib import Path

import jax

from shortcut_jax.core.json_text import to_json
from shortcut_jax.evaluation.judge import public_names
from shortcut_jax.evaluation.page import (
    ABSENT,
    known,
    metric_table,
    metrics_of,
    page,
    path_section,
    picture,
    quality_plot,
    section,
    table,
)
from shortcut_jax.evaluation.run import Result
from shortcut_jax.report import count_label
from shortcut_jax.runtime.distributed import say


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
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(out / "tensorboard")) as writer:
        for row in rows:
            step = result.steps.get(row["label"], 0)
            for name, value in row.items():
                if isinstance(value, float):
                    writer.add_scalar(f"evaluation/{row['label']}/{row['steps']}_steps/{name}", value, step)
        for label, losses in result.validation.items():
            for name, value in losses.items():
                writer.add_scalar(f"evaluation/{label}/{name}", value, result.steps.get(label, 0))


def to_html(result: Result) -> str:
    """The page."""
    metrics = [m for m in metrics_of(result.distance) if known(result.rows, m.key)]
    tables = [metric_table(result.rows, metric) for metric in metrics]
    notes = []
    if any(row["few_images"] for row in result.rows):
        notes.append(
            '<p class="warn">* fewer pictures than features: the covariance is singular and the distance is biased '
            "upwards; compare cells of equal counts only.</p>"
        )
    notes.append(
        "<p>A Frechet distance from fewer pictures is biased upwards; KID is not. KID, precision and recall come from "
        "a fixed sample of at most 10,000 features.</p>"
    )
    plots = "".join(quality_plot(result.rows, m) for m in metrics if m.key not in ("images_per_second", "kid"))
    quality = f"<div class=pair>{''.join(tables)}</div>"
    curves = f"<div class=pair>{plots}</div>"
    sections = [section("Quality", quality, *notes), section("Quality against steps", curves)]
    for label, sheet in result.sheets.items():
        title = f"Samples of {label}: the same noise down each column"
        sections.append(section(title, picture(sheet, title)))
    if result.paths:
        sections.append(section("How straight the field is", path_section(result.paths, result.times)))
    if result.validation:
        sections.append(section("Validation loss", _losses(result.validation)))
    if result.latency:
        sections.append(section("Latency", _latency(result.latency)))
    return page(f"Evaluation of {result.title}", "shortcut_jax evaluation", result.facts, sections)


def _losses(validation: dict[str, dict[str, float]]) -> str:
    names = list(dict.fromkeys(name for losses in validation.values() for name in losses))
    show = lambda losses, name: f"{losses[name]:.4f}" if name in losses else ABSENT
    body = [[label, *(show(losses, n) for n in names)] for label, losses in validation.items()]
    short = [name.rpartition("/")[2] for name in names]
    text = "Flow matching at fixed times with fixed noise, mean and by time (mlperf: 0, 1/8 ... 7/8, as the benchmark)."
    return f"<p>{text}</p>" + table(["weights", *short], body, best="min")


def _latency(latency: dict[str, dict[int, float]]) -> str:
    steps = sorted({n for times in latency.values() for n in times})
    show = lambda times, n: f"{1000 * times[n]:.3g} ms" if n in times else ABSENT
    body = [[label, *(show(times, n) for n in steps)] for label, times in latency.items()]
    text = "Time of one picture alone, encoding and decoding included, without compilation; median of 3."
    return f"<p>{text}</p>" + table(["weights", *map(count_label, steps)], body)
