"""The whole of an evaluation: every set of weights at every step count, and what is asked of the weights besides."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from shortcut_jax.core.schedules import sampling_grid
from shortcut_jax.core.straightness import PATH_STEPS
from shortcut_jax.core.text import count_label
from shortcut_jax.errors import ConfigError
from shortcut_jax.evaluation.accumulators import Tally
from shortcut_jax.evaluation.captions import CaptionBatch
from shortcut_jax.evaluation.metrics import Cell, against_teacher, figures
from shortcut_jax.evaluation.reference import Reference
from shortcut_jax.evaluation.sampling import Judges, latencies, sample_cell
from shortcut_jax.evaluation.subjects import Subject
from shortcut_jax.inference.image_files import thumbnail
from shortcut_jax.runtime.metrics import contact_sheet
from shortcut_jax.steps.networks import TEACHER

EXTRAS = ("grid", "field", "validation", "latency")
"""What else there is to know of weights: sample grids, how straight their field is, losses, time of one image."""

COLUMNS = 10
THUMBNAIL = 160


class Plan(NamedTuple):
    """What is to be judged.

    Attributes:
      views: of each subject; the first one in full.
      steps: step counts of the first view.
      images: images of its cells; 0 for as many as the subject has captions.
      other_steps: step counts of the other views.
      other_images: images of their cells; 0 as the first's.
      teacher_steps: of the teacher.
      seed: of the noise.
      extras: of `EXTRAS`, what is asked of the weights besides.
    """

    views: Sequence[str]
    steps: Sequence[int]
    images: int
    other_steps: Sequence[int]
    other_images: int
    teacher_steps: int
    seed: int
    extras: Sequence[str]


class Entry(NamedTuple):
    """One set of weights.

    Attributes:
      label: of it, among all.
      subject: whose weights.
      view: of the subject.
      cells: of it.
      asks: whose captions it is judged on: a teacher has those of its students.
      teacher: label of the entry that is its teacher.
    """

    label: str
    subject: Subject
    view: str
    cells: tuple[Cell, ...]
    asks: Subject
    teacher: str | None = None


class Result(NamedTuple):
    """All that was found.

    Attributes:
      title: of the page.
      facts: by name.
      distance: what the Frechet distance is called.
      rows: figures of each cell (`judge.figures`).
      paths: label -> `change` and `consistency` (`core.straightness.PathMeasures`).
      times: of `change`.
      validation: label -> losses by name.
      latency: label -> seconds of one image by steps.
      sheets: label -> sample grid.
      steps: training step by label.
    """

    title: str
    facts: dict[str, str]
    distance: str
    rows: list[dict[str, Any]]
    paths: dict[str, dict[str, list[float]]]
    times: list[float]
    validation: dict[str, dict[str, float]]
    latency: dict[str, dict[int, float]]
    sheets: dict[str, Image.Image]
    steps: dict[str, int]


def entries_of(subjects: Sequence[Subject], teacher: Subject | None, plan: Plan) -> list[Entry]:
    """All sets of weights and their cells, teachers first.

    Raises:
      ConfigError: a view that a subject has not.
    """
    several = len(subjects) > 1
    result = []
    for subject in subjects:
        missing = [view for view in plan.views if view not in subject.views]
        if missing:
            raise ConfigError(f"{subject.name} has no view {missing[0]!r}: it has {', '.join(subject.views)}")
        prefix = f"{subject.name}/" if several else ""
        images = plan.images or len(subject)
        own = TEACHER in subject.views and teacher is None
        judged_by = TEACHER if teacher is not None else (f"{prefix}{TEACHER}" if own else None)
        for i, view in enumerate(v for v in plan.views if v != TEACHER):
            label, num = f"{prefix}{view}", images if i == 0 else min(plan.other_images or images, images)
            cells = tuple(Cell(label, n, num) for n in (plan.steps if i == 0 else plan.other_steps))
            result.append(Entry(label, subject, view, cells, subject, judged_by))
        if own:
            cell = Cell(f"{prefix}{TEACHER}", plan.teacher_steps, images)
            result.insert(0, Entry(cell.label, subject, TEACHER, (cell,), subject))
    if teacher is not None:
        cell = Cell(TEACHER, plan.teacher_steps, max(e.cells[0].images for e in result))
        view = "slow" if "slow" in teacher.views else teacher.views[0]
        result.insert(0, Entry(TEACHER, teacher, view, (cell,), subjects[0]))
    return result


def evaluate(entries: Sequence[Entry], plan: Plan, judges: Judges, reference: Reference, out: Path) -> Result:
    """Makes and judges all images, and asks what else there is to know."""
    begin = time.perf_counter()
    names = {entry.label: entry.subject for entry in entries}
    subjects = list({id(entry.subject): entry.subject for entry in entries}.values())
    facts = {f"{s.name}: {k}" if len(subjects) > 1 else k: v for s in subjects for k, v in s.facts.items()}
    count = f"{reference.num_images:,} images, " if reference.num_images else ""
    facts |= {
        "distance": f"{judges.features.name}, {judges.features.size} features, in float64",
        "reference": f"{count}{reference.source}",
        "noise": f"seed {plan.seed}; Euler's method",
    }
    title = ", ".join(dict.fromkeys(e.subject.name for e in entries if e.label != TEACHER))
    steps = {label: s.step for label, s in names.items() if s.step is not None}
    times = np.asarray(sampling_grid(PATH_STEPS, PATH_STEPS))[1:-1]
    result = Result(title, facts, judges.features.name, [], {}, times.tolist(), {}, {}, {}, steps)
    total = sum(cell.steps * cell.images for entry in entries for cell in entry.cells)
    shown = {"disable": jax.process_index() > 0, "dynamic_ncols": True, "smoothing": 0.05}
    teachers: dict[str, tuple[dict[str, Any], Tally]] = {}
    with tqdm(total=total, unit="evaluation", unit_scale=True, **shown) as bar:
        for entry in entries:
            for row, tally in _judge(entry, plan, judges, reference, out, result, bar):
                if entry.teacher:
                    row = against_teacher(row, tally, *teachers[entry.teacher])
                elif any(other.teacher == entry.label for other in entries):  # which come after it
                    teachers[entry.label] = row, tally
                result.rows.append(row)
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    result.facts["made"] = f"{time.strftime('%Y-%m-%d')} on {devices} in {time.perf_counter() - begin:.0f} s"
    return result


def _judge(
    entry: Entry, plan: Plan, judges: Judges, reference: Reference, out: Path, result: Result, bar: tqdm
) -> Iterator[tuple[dict[str, Any], Tally]]:
    """The cells of an entry one after the other; what else is asked of its weights goes into `result`."""
    subject, label = entry.subject, entry.label
    weights = subject.weights(entry.view)
    in_full = entry.view in (plan.views[0], TEACHER)
    shown = entry.asks.show(COLUMNS)
    bar.set_description(f"{label}: compiling")
    subject.images(weights, shown, 1, plan.seed, 0)
    for cell in entry.cells:
        bar.set_description(str(cell))
        path = out / "cells" / f"{label.replace('/', '-')}-{cell.steps}.npz"
        tally = sample_cell(subject, weights, entry.asks, cell, plan.seed, judges, path, bar)
        row = figures(cell, tally, reference, judges.features)
        if jax.process_index() == 0:
            bar.write(f"{cell}: {judges.features.name} {row['distance']:.3g}")
        yield row, tally
    bar.set_description(f"{label}: the field")
    measured = subject.path(weights, plan.seed) if "field" in plan.extras else None
    if measured is not None:
        values = {"change": measured.change_K, "consistency": measured.consistency_L}
        result.paths[label] = {k: np.asarray(v).tolist() for k, v in values.items()}
    loss = subject.validate(weights) if "validation" in plan.extras else None
    if loss:
        result.validation[label] = loss
    counts = sorted({cell.steps for cell in entry.cells})
    if in_full and "latency" in plan.extras:
        one = CaptionBatch(shown.captions[:1])
        result.latency[label] = latencies(lambda n: subject.few(weights, one, n, plan.seed), counts)
    if in_full and "grid" in plan.extras:
        drawn = (subject.few(weights, shown, n, plan.seed) for n in counts)
        rows = [np.stack([thumbnail(pixels, THUMBNAIL) for pixels in images]) for images in drawn]
        words = [caption.split()[-1] if caption else "" for caption in shown.captions]
        columns = words if max(map(len, words)) <= 12 else ()
        result.sheets[label] = contact_sheet(rows, [count_label(n) for n in counts], columns)
