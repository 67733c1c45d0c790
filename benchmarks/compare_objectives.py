"""Objectives side by side: `python -m benchmarks.compare_objectives --methods=scfm,shortcut --seeds=0,1,2`.

Each run is a training and an evaluation of its slow EMA, and leaves one JSON and a small image under
`benchmarks/results/SET/`. The tables, the page and the image of a set are made from these files alone, so that runs
can be added on any day and machine; a run that has its file is not made again, and one that was cut off goes on where
it was. `--table` makes them without any run, `--image=FILE --rows=flow,scfm` an image of some rows alone.

`--vary="FIELD=VALUE [FIELD=VALUE ...]"` is for tuning and ablations: each makes the methods' runs once more with those
changes, as rows of their own. Methods are tuned on seed 100, which no other table has. `--equal_compute` gives each
method as many steps as the FLOPs of `scfm` in `--steps` steps pay for, again as rows of their own.

Methods named `distill` learn from the run of `flow` with the same seed and `--teacher_steps`, which has to be there:
`--methods=distill,distill-rolled --steps=600`, and `--vary=data.limit=10` for ten images.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from benchmarks import objectives_page
from benchmarks.objectives_page import FIGURES, STEPS
from shortcut_jax import cli
from shortcut_jax.cluster.distributed import say
from shortcut_jax.config.checks import from_config
from shortcut_jax.config.load import load_config
from shortcut_jax.core.json_text import to_json
from shortcut_jax.errors import UsageError
from shortcut_jax.evaluation.subjects import RunSubject
from shortcut_jax.run.assembly import Assembly

USAGE = (
    "usage: python -m benchmarks.compare_objectives [--set=digits] [--methods=scfm,flow] [--seeds=0,1] [--steps=N] "
    "[--vary=FIELD=VALUE]"
)
RESULTS = Path(__file__).parent / "results"

SETS = {
    "digits": (),
    "glyphs": ("--features=network", "--images=2000"),
    "emoji32": ("--features=network",),
}
"""Sets -> what `evaluate` is told; `configs/SET.py` is what every method starts from."""

ALIKE = {"optimizer.learning_rate": 0.008, "multistep_start": 1.0, "multistep_times": "first"}
TUNED = {"student_weights": "()", "one_step_share": 0.82, "jumps": 4, "timestep_range": "(0.0,0.9)", **ALIKE}
WITHOUT_START = {"objective": "scfm", **TUNED, "ema.warmup_ratio": 4.0}
SCFM = {
    **WITHOUT_START,
    "multistep_start": 0.99,
    "one_step_share": "None",
    "student_weights": "(3.0,4.0,2.0,2.0,0.7,0.7,0.3,0.3)",
}
UNTOLD = {"student_weights": "()", "one_step_share": "None", "jumps": 2, "timestep_range": "(0.0,1.0)", **ALIKE}
FORMER = {
    "student_weights": "(1.0,1.25,1.7,1.6,1.9,1.8,2.3,2.3)",
    "one_step_share": "None",
    "jumps": 2,
    "timestep_range": "(0.0,1.0)",
    "optimizer.learning_rate": 0.002,
    "multistep_start": 1.0,
    "multistep_times": "first",
    "ema.warmup_ratio": 1.0,
}
DISTILLED = {
    "student_weights": "()",
    "one_step_share": 0.82,
    "jumps": 4,
    "teacher_grid": 64,
    "rows.self_rows": 3,
    "rows.flow_rows": 1,
    "timestep_range": "(0.0,0.9)",
    "shift.low": 1.0,
    "shift.high": 1.0,
}
FEW = {
    **DISTILLED,
    "rows.self_rows": 1,
    "rows.flow_rows": 0,
    "timestep_range": "(0.0,1.0)",
    "shift.low": 0.7,
    "shift.high": 1.4,
}
ROLLED = {**DISTILLED, "rows.self_rows": 0, "rows.rolled_rows": 1, "rows.flow_rows": 0, "timestep_range": "(0.0,1.0)"}
METHODS: dict[str, dict[str, Any]] = {
    "flow": {"objective": "flow", **UNTOLD},
    "scfm": SCFM,
    "scfm-without-start": WITHOUT_START,
    "scfm-rolled": {**WITHOUT_START, "rows.rolled_rows": 1, "rows.flow_rows": 2},
    "shortcut": {
        "objective": "shortcut",
        **TUNED,
        "one_step_share": "None",
        "student_weights": SCFM["student_weights"],
    },
    "shortcut-share": {"objective": "shortcut", **TUNED},
    "alpha": {"objective": "alpha", **UNTOLD},
    "meanflow": {"objective": "meanflow", **UNTOLD, "adaptive_power": 1.0},
    "meanflow-squared": {"objective": "meanflow", **UNTOLD},
    "scfm-former": {"objective": "scfm", **FORMER},
    "shortcut-former": {"objective": "shortcut", **FORMER},
    "scfm-without-weights": {**SCFM, "student_weights": "()"},
    "scfm-without-jumps": {**SCFM, "jumps": 2},
    "scfm-without-range": {**SCFM, "timestep_range": "(0.0,1.0)"},
    "scfm-without-warmup-ratio": {**SCFM, "ema.warmup_ratio": 1.0},
    "scfm-without-dual": {**SCFM, "ema.warmup_ratio": 1.0, "ema.dual": False},
    "scfm-float8": {**SCFM, "model.matmul_dtype": "float8"},
    "distill": DISTILLED,
    "distill-few": FEW,
    "distill-rolled": ROLLED,
    "distill-former": {
        "student_weights": FORMER["student_weights"],
        "one_step_share": "None",
        "jumps": 2,
        "teacher_grid": 32,
        "rows.self_rows": 1,
        "rows.flow_rows": 0,
        "shift.low": 0.7,
        "shift.high": 1.4,
    },
    "distill-all": {"train": "all", **DISTILLED},
    "distill-all-rolled": {"train": "all", **ROLLED},
}
"""Rows of the table -> what they change in the config. `former` is what was configured before 2026-11-25."""

DISTILL = "configs/digits_distill.py"
"""What the methods named `distill` start from."""

COLUMNS = 10
"""Captions of the image of a run."""


class Run(NamedTuple):
    """One training.

    Attributes:
      set: name of the set.
      method: a key of `METHODS`.
      change: of `--vary`, or empty.
      steps: training steps, of the file's name too.
      seed: training seed.
      equal_compute: whether it takes as many steps as `steps` steps of `scfm` cost, in place of `steps`.
      teacher_steps: of the `flow` run that a `distill` learns from.
    """

    set: str
    method: str
    change: str
    steps: int
    seed: int
    equal_compute: bool = False
    teacher_steps: int = 1000

    @property
    def label(self) -> str:
        """The name of its row: the method, and how it was varied."""
        return " ".join(filter(None, (self.method, self.change, "at equal compute" * self.equal_compute)))

    @property
    def path(self) -> Path:
        """Its file."""
        return RESULTS / self.set / f"{self.steps}-{self.label.replace(' ', '-')}-seed{self.seed}.json"

    @property
    def config(self) -> Path:
        """The config file that it starts from."""
        return Path(DISTILL if self.distils else f"configs/{self.set}.py")

    @property
    def changes(self) -> dict[str, Any]:
        """What it changes there, but for steps and seed."""
        return {**METHODS[self.method], **dict(one.split("=", 1) for one in self.change.split())}

    @property
    def distils(self) -> bool:
        """Whether it learns from a teacher."""
        return self.method.startswith("distill")


def main(argv: Sequence[str]) -> int:
    """Makes the runs that have no file yet, then the table of all that have."""
    from absl import flags

    values = cli.new_flags()
    flags.DEFINE_enum("set", "digits", tuple(SETS), "What is learned.", flag_values=values)
    flags.DEFINE_list("methods", ["scfm", "shortcut", "flow"], f"Of {', '.join(METHODS)}.", flag_values=values)
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Training seeds.", flag_values=values)
    flags.DEFINE_integer("steps", 1000, "Training steps.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("runs", "runs/compare", "Folder of the workdirs.", flag_values=values)
    flags.DEFINE_multi_string("vary", [], "FIELD=VALUE ...: the methods with that; repeatable.", flag_values=values)
    flags.DEFINE_bool("equal_compute", False, "Steps by the FLOPs of scfm.", flag_values=values)
    flags.DEFINE_integer("teacher_steps", 1000, "Training steps of teachers.", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("table", False, "Only table, page and image.", flag_values=values)
    flags.DEFINE_string("out", "docs/objectives", "Folder of the page and the image.", flag_values=values)
    flags.DEFINE_string("image", None, "Only this file: the images of --rows.", flag_values=values)
    flags.DEFINE_list("rows", ["flow", "scfm", "shortcut"], "With --image: labels of rows.", flag_values=values)
    options = cli.parse(values, argv, USAGE)
    for method in options.methods:
        if method not in METHODS:
            raise UsageError(f"there is no method {method!r}: choose of {', '.join(METHODS)}")
    for change in options.vary:
        if not change.split() or not all("=" in one for one in change.split()):
            raise UsageError(f"--vary={change} is not FIELD=VALUE, such as --vary=optimizer.learning_rate=0.003")
    if options.image:
        write_image(options.set, options.steps, options.rows, Path(options.image))
        return 0
    for seed in cli.whole_numbers("seeds", options.seeds, 0, 2**32 - 1):  # a seed of all methods, then the next
        for change in () if options.table else options.vary or [""]:
            for method in options.methods:
                given = options.set, method, change, options.steps, seed, options.equal_compute, options.teacher_steps
                make(Run(*given), Path(options.runs))
    records = read(options.set, options.steps)
    for tuning in (True, False):
        print(objectives_page.markdown_table(objectives_page.rows_of(records, list(METHODS), tuning)), end="\n\n")
    for path in objectives_page.write(records, list(METHODS), RESULTS / options.set, Path(options.out)):
        say(f"written  {path}")
    return 0


def write_image(name: str, steps: int, labels: Sequence[str], path: Path) -> None:
    """The images of some rows, one below the other. Raises UsageError for a row without runs."""
    rows = {row.label: row for row in objectives_page.rows_of(read(name, steps), list(METHODS), tuning=False)}
    if missing := [label for label in labels if label not in rows]:
        raise UsageError(f"--rows={missing[0]} has no run of {steps} steps on {name}: choose of {', '.join(rows)}")
    drawn = objectives_page.sheet([rows[label] for label in labels], RESULTS / name, steps)
    if drawn is None:
        raise UsageError(f"the runs of {', '.join(labels)} have no images")
    drawn.save(path)
    say(f"written  {path}")


def make(run: Run, runs: Path) -> None:
    """Trains, evaluates, and writes the files of a run, unless they are there.

    Raises:
      subprocess.CalledProcessError: a command failed.
    """
    if run.path.exists():
        say(f"{run.path.name} is there")
        return
    workdir = runs / run.set / run.path.stem
    steps = equal_steps(run) if run.equal_compute else run.steps
    changes = {"steps": steps, "seed": run.seed, "eval.views": "()", "eval.images": "()", **run.changes}
    if run.distils:
        changes["init_from"] = teacher_of(run, runs)
    train = ["-m", "shortcut_jax.train", f"--config={run.config}", f"--workdir={workdir}"]
    train += [f"--config.{key}={value}" for key, value in changes.items()]
    begin = time.monotonic()
    subprocess.run([sys.executable, *train], check=True)
    seconds = time.monotonic() - begin
    evaluate = ["-m", "shortcut_jax.evaluate", f"--workdir={workdir}", "--views=slow", "--extras=", *SETS[run.set]]
    subprocess.run([sys.executable, *evaluate, f"--steps={','.join(map(str, STEPS))}"], check=True)
    found = json.loads((workdir / "evaluation" / "evaluation.json").read_text())
    record = {
        "set": run.set,
        "method": run.label,
        "steps": run.steps,
        "trained_steps": steps,
        "seed": run.seed,
        "command": "python " + " ".join(train),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(seconds),
        "cores": os.cpu_count(),
        "facts": {name: fact for name, fact in found["facts"].items() if name != "run"},  # which is a local path
        "cells": [
            {key: cell[key] for key in ("steps", "images", *FIGURES) if cell.get(key) is not None}
            for cell in found["cells"]
            if cell["label"].endswith("slow")
        ],
    }
    run.path.parent.mkdir(parents=True, exist_ok=True)
    record["captions"] = draw(workdir, run.path.with_suffix(".png"))
    run.path.write_text(to_json(record, indent=1) + "\n")


def teacher_of(run: Run, runs: Path) -> Path:
    """The workdir of its teacher. Raises UsageError where it is not found."""
    teacher = Run(run.set, "flow", "", run.teacher_steps, run.seed)
    workdir = runs / run.set / teacher.path.stem
    if not (workdir / "checkpoints").is_dir():
        raise UsageError(
            f"{run.label} learns from {workdir}, which is not found: make it with --methods=flow --seeds={run.seed} "
            f"--steps={run.teacher_steps} (and without {teacher.path.name}, if that is there)"
        )
    return workdir


def equal_steps(run: Run) -> int:
    """The steps of a run that cost what `steps` steps of `scfm` cost, by the FLOPs of the network's evaluations.

    Raises UsageError for one that learns from a teacher, whose steps and network are others.
    """
    if run.distils:
        raise UsageError(f"--equal_compute is for methods that train from scratch, which {run.method} does not")

    def flops(one: Run) -> float:
        config = load_config(one.config, {key: str(value) for key, value in one.changes.items()})
        return Assembly(from_config(config), jax.devices()[:1]).flops()

    return round(run.steps * flops(run._replace(method="scfm", change="")) / flops(run))


def draw(workdir: Path, path: Path) -> list[str]:
    """The image of a run: a row of the same captions and noise for each of `STEPS`, without any gap; the captions."""
    subject = RunSubject(str(workdir), max(STEPS), COLUMNS)
    weights, asked = subject.weights("slow"), subject.show(COLUMNS)
    rows = [np.concatenate(list(subject.few(weights, asked, n, seed=0)), axis=1) for n in STEPS]
    pixels = np.concatenate(rows)
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path, optimize=True)
    jax.clear_caches()
    return list(asked.captions)


def read(name: str, steps: int) -> list[dict[str, Any]]:
    """The records of a set and a number of training steps."""
    return [json.loads(path.read_text()) for path in sorted((RESULTS / name).glob(f"{steps}-*.json"))]


if __name__ == "__main__":
    cli.run(main)
