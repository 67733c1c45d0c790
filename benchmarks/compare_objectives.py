"""Objectives side by side: `python -m benchmarks.compare_objectives --methods=scfm,shortcut --seeds=0,1,2`.

Each run is a training and an evaluation of its slow average, and leaves one JSON under `benchmarks/results/SET/`. The
table is made from these files alone, so that runs can be added on any day and machine; a run that has its file is not
made again, and one that was cut off goes on where it was. `--table` makes the table without any run.

`--vary="FIELD=VALUE [FIELD=VALUE ...]"` is for tuning and ablations: each makes the methods' runs once more with those
changes, as rows of their own. Methods are tuned on seed 100, which no other table has.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shortcut_jax import command
from shortcut_jax.core.json_text import to_json
from shortcut_jax.report import count_label, markdown
from shortcut_jax.runtime.distributed import say

USAGE = (
    "usage: python -m benchmarks.compare_objectives [--set=digits] [--methods=scfm,flow] [--seeds=0,1] [--steps=N] "
    "[--vary=FIELD=VALUE]"
)
RESULTS = Path(__file__).parent / "results"
STEPS = (1, 2, 3, 4, 8, 32)
"""Sampling step counts of every table."""

SETS = {name: f"configs/{name}.py" for name in ("digits", "glyphs", "emoji32")}
"""Sets -> the config that every method starts from."""

RATE = {"optimizer.learning_rate": 0.008}
TUNED = {"student_weights": "()", "one_step_share": 0.82, "jumps": 4, "timestep_range": "(0.0,0.9)", **RATE}
UNTOLD = {"student_weights": "()", "one_step_share": "None", "jumps": 2, "timestep_range": "(0.0,1.0)", **RATE}
FORMER = {
    "student_weights": "(1.0,1.25,1.7,1.6,1.9,1.8,2.3,2.3)",
    "one_step_share": "None",
    "jumps": 2,
    "timestep_range": "(0.0,1.0)",
    "optimizer.learning_rate": 0.002,
}
METHODS: dict[str, dict[str, Any]] = {
    "flow": {"objective": "flow", **UNTOLD},
    "scfm": {"objective": "scfm", **TUNED},
    "scfm-rolled": {"objective": "scfm", **TUNED, "rows.rolled_rows": 1, "rows.flow_rows": 2},
    "shortcut": {"objective": "shortcut", **TUNED},
    "alpha": {"objective": "alpha", **UNTOLD},
    "meanflow": {"objective": "meanflow", **UNTOLD},
    "scfm-former": {"objective": "scfm", **FORMER},
    "shortcut-former": {"objective": "shortcut", **FORMER},
    "scfm-without-share": {"objective": "scfm", **TUNED, "one_step_share": "None"},
    "scfm-without-jumps": {"objective": "scfm", **TUNED, "jumps": 2},
    "scfm-without-range": {"objective": "scfm", **TUNED, "timestep_range": "(0.0,1.0)"},
}
"""Rows of the table -> what they change in the config. `former` is what was configured before 2026-11-25."""

FIGURES = ("frechet_distance", "accuracy", "precision", "recall")


def main(argv: Sequence[str]) -> int:
    """Makes the runs that have no file yet, then the table of all that have."""
    from absl import flags

    values = command.new_flags()
    flags.DEFINE_enum("set", "digits", tuple(SETS), "What is learned.", flag_values=values)
    flags.DEFINE_list("methods", ["flow", "scfm", "shortcut"], f"Of {', '.join(METHODS)}.", flag_values=values)
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Training seeds.", flag_values=values)
    flags.DEFINE_integer("steps", 1000, "Training steps.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("runs", "runs/compare", "Folder of the workdirs.", flag_values=values)
    flags.DEFINE_multi_string("vary", [], "FIELD=VALUE ...: the methods with that; repeatable.", flag_values=values)
    flags.DEFINE_bool("table", False, "Only the table.", flag_values=values)
    options = command.parse(values, argv, USAGE)
    for method in options.methods:
        if method not in METHODS:
            raise command.UsageError(f"there is no method {method!r}: choose of {', '.join(METHODS)}")
    for change in options.vary:
        if not change.split() or not all("=" in one for one in change.split()):
            raise command.UsageError(
                f"--vary={change} is not FIELD=VALUE, such as --vary=optimizer.learning_rate=0.003"
            )
    for seed in command.whole_numbers("seeds", options.seeds, 0, 2**32 - 1):  # a seed of all methods, then the next
        for change in () if options.table else options.vary or [""]:
            for method in options.methods:
                path = result_path(options.set, label(method, change), options.steps, seed)
                if path.exists():
                    say(f"{path.name} is there")
                else:
                    run(options.set, method, change, options.steps, seed, Path(options.runs))
    print(table(read(options.set, options.steps)))
    return 0


def label(method: str, change: str) -> str:
    """The name of a row: the method, and how it was varied."""
    return f"{method} {change}".strip()


def result_path(name: str, label: str, steps: int, seed: int) -> Path:
    """The file of one run."""
    return RESULTS / name / f"{steps}-{label.replace(' ', '-')}-seed{seed}.json"


def run(name: str, method: str, change: str, steps: int, seed: int, runs: Path) -> None:
    """Trains, evaluates, and writes the file. Raises CalledProcessError where one of them fails."""
    path = result_path(name, label(method, change), steps, seed)
    workdir = runs / name / path.stem
    changes = {**METHODS[method], "steps": steps, "seed": seed, "eval.views": "()", "eval.images": "()"}
    changes |= dict(one.split("=", 1) for one in change.split())
    train = ["-m", "shortcut_jax.train", f"--config={SETS[name]}", f"--workdir={workdir}"]
    train += [f"--config.{key}={value}" for key, value in changes.items()]
    begin = time.monotonic()
    subprocess.run([sys.executable, *train], check=True)
    seconds = time.monotonic() - begin
    evaluate = ["-m", "shortcut_jax.evaluate", f"--workdir={workdir}", "--views=slow", "--extras="]
    subprocess.run([sys.executable, *evaluate, f"--steps={','.join(map(str, STEPS))}"], check=True)
    found = json.loads((workdir / "evaluation" / "evaluation.json").read_text())
    record = {
        "set": name,
        "method": label(method, change),
        "steps": steps,
        "seed": seed,
        "command": "python " + " ".join(train),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(seconds),
        "cores": os.cpu_count(),
        "facts": {name: fact for name, fact in found["facts"].items() if name != "run"},  # which is a local path
        "cells": [{key: cell[key] for key in ("steps", "images", *FIGURES)} for cell in found["cells"]],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(record, indent=1) + "\n")


def read(name: str, steps: int) -> list[dict[str, Any]]:
    """The records of a set and a number of training steps."""
    return [json.loads(path.read_text()) for path in sorted((RESULTS / name).glob(f"{steps}-*.json"))]


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a method and figure, its mean over the training seeds and the range of them."""
    rows = []
    for figure in FIGURES:
        for method in sorted({r["method"] for r in records}, key=_place):
            own = [r for r in records if r["method"] == method]
            if own:
                by_steps = [[c[figure] for r in own for c in r["cells"] if c["steps"] == n] for n in STEPS]
                rows.append([f"{method}, {count_label(len(own), 'seed')}", figure, *map(_mean_and_range, by_steps)])
    return markdown([["method", "figure", *map(count_label, STEPS)], *rows])


def _place(label: str) -> tuple[int, str]:
    """Where a row stands: in the order of `METHODS`, the variants of one after it."""
    return list(METHODS).index(label.split(" ")[0]), label


def _mean_and_range(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


if __name__ == "__main__":
    command.run(main)
