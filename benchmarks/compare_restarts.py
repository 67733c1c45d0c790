"""When to restart the EMAs: `python -m benchmarks.compare_restarts [--steps=600] [--seeds=0,1,2]`.

Trains the digits by post-training (from a teacher, which is trained first if absent) and from scratch, with the
averages restarted never or every N steps, and prints the Frechet distance of the slow EMA
at few sampling steps: mean and half the distance of the extremes over training seeds. The EMAs have no warm-up, as
published, but for the last row. A period that is not shorter than the run is the same as never, and is not run again.
"""

import argparse
from pathlib import Path

import numpy as np

from shortcut_jax import train
from shortcut_jax.core.text import count_label, markdown
from shortcut_jax.data.records import open_source
from shortcut_jax.evaluation.digits import make_reference, score
from shortcut_jax.inference.run_pipeline import Pipeline

KINDS = {"distil": "configs/digits_distill.py", "pretrain": "configs/digits.py"}
SETTINGS = {
    "distil": (  # and of configs/digits_distill.py
        *("student_weights=1,1.25,1.7,1.6,1.9,1.8,2.3,2.3", "one_step_share=None", "jumps=2", "teacher_grid=32"),
        *("rows.self_rows=1", "rows.flow_rows=0", "timestep_range=(0.0,1.0)", "shift.low=0.7", "shift.high=1.4"),
    ),
    "pretrain": (  # those of configs/digits.py when its row of the table was made
        *("multistep_start=1.0", "ema.warmup_ratio=1.0", "student_weights=1,1.25,1.7,1.6,1.9,1.8,2.3,2.3", "jumps=2"),
        *("timestep_range=(0.0,1.0)", "optimizer.learning_rate=0.002"),
    ),
}
COUNTS = (1, 2, 3, 4)


def _rules(periods):
    rules = {"never": []}
    rules |= {f"every {n}": [f"--config.ema.restart_every={n}"] for n in periods}
    rules |= {"never, warm-up": ["--config.ema.warmup=true"]}
    return {name: ["--config.ema.warmup=false", *rule] for name, rule in rules.items()}


def _run(kind, workdir, seed, rule, options):
    """The distances of one run at each of COUNTS."""
    argv = ["train", f"--config={KINDS[kind]}", f"--workdir={workdir}", f"--config.seed={seed}", *rule]
    argv += [f"--config.steps={options.steps}", f"--config.batch_size={options.batch}", "--config.eval.steps=(1,)"]
    argv += ["--config.eval.views=()", "--config.eval.images=()", "--config.log_every=1"]
    argv += [f"--config.init_from={options.teacher}"] * (kind == "distil")
    argv += [f"--config.{change}" for change in (*SETTINGS[kind], *options.set)]
    if train.main(argv):
        raise SystemExit("interrupted")
    pipeline = Pipeline(workdir, "slow", max_steps=max(COUNTS), batch_size=256)
    reference = make_reference(open_source(pipeline.settings.data))
    judge = lambda n: score(pipeline.generate, pipeline.params, "slow", n, reference, 0, (0,)).distances[0]
    return [judge(n) for n in COUNTS]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", default="0,1,2", help="of post-training; from scratch takes the first")
    parser.add_argument("--periods", default="50,200,800")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--teacher", default="runs/digits-teacher")
    parser.add_argument("--folder", default="runs/restarts")
    parser.add_argument("--set", action="append", default=[], help="further config fields, as ema.slow=0.99")
    options = parser.parse_args()
    seeds = [int(s) for s in options.seeds.split(",")]
    for kind in options.kinds.split(","):
        some = seeds if kind == "distil" else seeds[:1]
        rows = [["restart", *map(count_label, COUNTS)], *_table(kind, some, options)]
        print(f"\n{kind}, {options.steps} steps of {options.batch} rows, slow EMA\n\n{markdown(rows)}\n", flush=True)


def _table(kind, seeds, options):
    never = None
    for name, rule in _rules([int(n) for n in options.periods.split(",")]).items():
        same = name.startswith("every") and int(name.split()[1]) >= options.steps
        stem = Path(options.folder) / f"{kind}-{name.replace(',', '').replace(' ', '-')}"
        found = never if same else [_run(kind, Path(f"{stem}-{seed}"), seed, rule, options) for seed in seeds]
        never = found if name == "never" else never
        table = np.array(found)
        spread = (table.max(axis=0) - table.min(axis=0)) / 2
        cells = [f"{m:.2f}" + f" ±{s:.2f}" * (len(found) > 1) for m, s in zip(table.mean(axis=0), spread, strict=True)]
        row = [f"{name} (as never)" if same else name, *cells]
        print(f"{kind}: {row}", flush=True)
        yield row


if __name__ == "__main__":
    main()
