"""Several trained runs side by side: `python -m shortcut_jax.compare --workdir=runs/a --workdir=runs/b --out=docs/x`.

Every run is judged on the same captions, noise seeds and sampling grid; the first one is the baseline of the ratios.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shortcut_jax import cli
from shortcut_jax.cluster.distributed import say
from shortcut_jax.cluster.shared_folder import check_place
from shortcut_jax.core.text import count_label, markdown
from shortcut_jax.data.training import TrainingData
from shortcut_jax.errors import UsageError
from shortcut_jax.evaluation.digits import Score, cell, reference_of, score
from shortcut_jax.inference.run_pipeline import Pipeline
from shortcut_jax.inference.sheets import grid_captions
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
    pipelines = [Pipeline(w, options.view, max_steps=max(steps), batch_size=256) for w in options.workdir]
    names = [p.settings.objective for p in pipelines]
    if len(set(names)) < len(names):
        names = [Path(w).name for w in options.workdir]

    data = pipelines[0].settings.data
    data = dataclasses.replace(data, dir=options.data_dir or data.dir, mix=(), weights=())
    reference = reference_of(TrainingData(data))
    if isinstance(reference, str):
        raise UsageError(f"{options.workdir[0]} cannot be compared in pixels: {reference}")
    scores: dict[str, list[Score]] = {}
    for name, pipeline in zip(names, pipelines, strict=True):
        scores[name] = []
        for n in steps:
            judged = score(pipeline.generate, pipeline.params, options.view, n, reference, options.images, seeds)
            scores[name].append(judged)
            say(f"{name} at {n} steps: {cell(judged)}")

    captions = grid_captions((), reference.captions, options.columns)
    labels = [f"{name}, {count_label(n)}" for name in names for n in steps]
    rows = [pipeline(captions, steps=n) for pipeline in pipelines for n in steps]
    image = contact_sheet(rows, labels, [c.split()[-1] for c in captions])
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    image.save(f"{options.out}.png")
    body = table(scores, steps)
    facts = [
        f"{name}: {Path(w).name}, {p.step} steps, global batch {p.settings.batch_size}, training seed {p.settings.seed}"
        for name, w, p in zip(names, options.workdir, pipelines, strict=True)
    ]
    facts.append(f"{options.view} view, {scores[names[0]][0].images} images for each of {len(seeds)} noise seeds")
    facts.append(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {time.strftime('%Y-%m-%d')}")
    Path(f"{options.out}.md").write_text(body + "\n\n" + "\n".join(f"- {fact}" for fact in facts) + "\n")
    print(body)
    return 0


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
