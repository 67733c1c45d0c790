"""Several trained runs side by side: `python -m shortcut_jax.compare --workdir=runs/a --workdir=runs/b --out=docs/x`.

Every run is judged on the same captions, noise seeds and sampling grid; the first one is the baseline of the ratios.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from shortcut_jax import cli
from shortcut_jax.cluster.distributed import say
from shortcut_jax.cluster.shared_folder import check_place
from shortcut_jax.core.stats import frechet_distance, gaussian_of
from shortcut_jax.core.text import count_label, markdown
from shortcut_jax.errors import UsageError
from shortcut_jax.evaluation.digits import MOST_RECORDS, Score, cell, classifier
from shortcut_jax.evaluation.features import MAX_PIXELS, pixels
from shortcut_jax.evaluation.metrics import Cell
from shortcut_jax.evaluation.reference import open_reference
from shortcut_jax.evaluation.sampling import Judges, sample_cell
from shortcut_jax.evaluation.subjects import RunSubject
from shortcut_jax.inference.request import SampleRequest
from shortcut_jax.runtime.metrics import contact_sheet
from shortcut_jax.steps.networks import VIEWS

USAGE = "usage: python -m shortcut_jax.compare --workdir=A --workdir=B [--steps=1,2,4] [--seeds=0,1] [--out=docs/x]"


def main(argv: Sequence[str]) -> int:
    """Parses the command line, judges every run, writes OUT.md and OUT.png and prints the table."""
    from absl import flags

    values = cli.new_flags()
    flags.DEFINE_multi_string("workdir", None, "Folder of a training run; several times.", flag_values=values)
    flags.DEFINE_list("steps", ["1", "2", "3", "4", "8", "32"], "Sampling step counts.", flag_values=values)
    flags.DEFINE_list("seeds", ["0", "1", "2", "3"], "Noise seeds.", flag_values=values)
    flags.DEFINE_enum("view", "slow", VIEWS, "Weights to judge.", flag_values=values)
    flags.DEFINE_integer("images", 0, "Images for each seed; 0 means as many as the data set has.", flag_values=values)
    flags.DEFINE_integer("columns", 10, "Columns of the image.", flag_values=values)
    flags.DEFINE_string("data_dir", None, "Folder of TFDS sets; the runs' own by default.", flag_values=values)
    flags.DEFINE_string("out", "comparison", "Files to write, without their endings.", flag_values=values)
    options = cli.parse(values, argv, USAGE, required=["workdir"])
    check_place(Path(f"{options.out}.md"), "--out", folder=False)
    steps = cli.whole_numbers("steps", options.steps, 1)
    seeds = cli.whole_numbers("seeds", options.seeds, 0, 2**32 - 1)
    if options.images < 0 or options.images == 1:
        raise UsageError(f"--images is {options.images}, but must be 0 for all, or at least 2")
    request = SampleRequest((), guidance=1.0, view=options.view)
    subjects = [RunSubject(w, max(steps), 256, request, data_dir=options.data_dir) for w in options.workdir]
    names = [subject.pipeline.settings.objective for subject in subjects]
    if len(set(names)) < len(names):
        names = [subject.name for subject in subjects]
    scores, rows, shown = dict[str, list[Score]](), list[np.ndarray](), subjects[0].show(options.columns)
    with tempfile.TemporaryDirectory() as folder:
        judged = _Judged(subjects[0], options.images, seeds, Path(folder))
        for name, subject in zip(names, subjects, strict=True):
            weights = subject.weights(options.view)
            scores[name] = []
            for n in steps:
                scores[name].append(judged.score(subject, weights, options.view, n))
                say(f"{name} at {count_label(n)}: {cell(scores[name][-1])}")
                rows.append(subject.few(weights, shown, n, seed=0))

    labels = [f"{name}, {count_label(n)}" for name in names for n in steps]
    image = contact_sheet(rows, labels, [caption.split()[-1] for caption in shown.captions])
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    image.save(f"{options.out}.png")
    body = table(scores, steps)
    facts = [f"{name}: {_described(subject)}" for name, subject in zip(names, subjects, strict=True)]
    facts.append(f"{options.view} view, {scores[names[0]][0].images} images for each of {len(seeds)} noise seeds")
    facts.append(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {time.strftime('%Y-%m-%d')}")
    Path(f"{options.out}.md").write_text(body + "\n\n" + "\n".join(f"- {fact}" for fact in facts) + "\n")
    print(body)
    return 0


class _Judged:
    """How `evaluate` judges images of the captions of the first run: in pixels, once for each noise seed."""

    def __init__(self, asks: RunSubject, images: int, seeds: Sequence[int], folder: Path):
        own, instead = asks.captioned, "python -m shortcut_jax.evaluate judges such runs"
        if asks.data.store == "captions":
            raise UsageError(f"{asks.name} cannot be compared in pixels: there are captions alone; {instead}")
        if len(own) < 2:
            raise UsageError(f"{asks.name} cannot be compared: its set has {len(own)} images, but a distance needs 2")
        shape = own.images([0]).shape[1:]
        if np.prod(shape) > MAX_PIXELS:
            raise UsageError(
                f"{asks.name} cannot be compared in pixels: images of {np.prod(shape):,} values are too large (at most "
                f"{MAX_PIXELS:,}); {instead}"
            )
        self._images = min(images or MOST_RECORDS, len(own))
        self._asks, self._seeds, self._folder = asks, seeds, folder
        self._judges = Judges(pixels(shape), classify=classifier(own))
        self._reference = open_reference(None, own, self._judges.features, folder)

    def score(self, subject: RunSubject, weights: Any, view: str, steps: int) -> Score:
        """One cell of the table."""
        one, distances, accuracies = Cell(subject.name, steps, self._images), list[float](), list[float]()
        for number, seed in enumerate(self._seeds):
            path = self._folder / f"{subject.name}-{steps}-{number}.npz"
            with tqdm(total=steps * one.images, desc=str(one), unit_scale=True, leave=False) as bar:
                tally = sample_cell(subject, weights, self._asks, one, seed, self._judges, path, bar)
            path.unlink()
            distances.append(frechet_distance(gaussian_of(tally.moments), self._reference.gaussian))
            if tally.sums["labelled"]:
                accuracies.append(tally.sums["classified"] / tally.sums["labelled"])
        return Score(view, steps, one.images, tuple(distances), tuple(accuracies))


def _described(subject: RunSubject) -> str:
    settings = subject.pipeline.settings
    return f"{subject.name}, {subject.step} steps, global batch {settings.batch_size}, training seed {settings.seed}"


def table(scores: dict[str, list[Score]], steps: Sequence[int]) -> str:
    """Markdown: a row a run of `distance / accuracy`, and under every later run its distance over the first one's."""
    baseline, *others = scores
    mean = lambda name: np.array([np.mean(s.distances) for s in scores[name]])
    rows: list[list[Any]] = [[baseline, *(cell(s) for s in scores[baseline])]]
    for name in others:
        rows.append([name, *(cell(s) for s in scores[name])])
        rows.append([f"{name} / {baseline}", *(f"{r:.2f} x" for r in mean(name) / mean(baseline))])
    return markdown([["objective", *map(count_label, steps)], *rows])


if __name__ == "__main__":
    cli.run(main)
