"""What asynchronous saves cost: `python -m benchmarks.measure_saving [--steps=200] [--every=20] [--turns=2]`.

The digits run with a checkpoint every `--every` steps and the same run without (but for the one at its end), each a
whole process with an empty workdir, in turn. Prints the total times and their ratios; fails where the median ratio is
above `--limit`.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from shortcut_jax.cluster.json_lines import read_lines


class Spent(NamedTuple):
    """What a process took: `wall` and processor (`cpu`) seconds in all, and `blocked` ones in saves by its own account.

    Other work on the machine stretches the wall time of either run as it comes and goes; the others show it.
    """

    wall: float
    cpu: float
    blocked: float


def spent(workdir: Path, steps: int, every: int, data_dir: str | None) -> Spent:
    """Runs the process that trains for `steps` steps, from its start to its end."""
    options = {"steps": steps, "checkpoint_every": every, "keep": 3, "eval.views": "()", "eval.images": "()"}
    if data_dir is not None:
        options["data.dir"] = data_dir
    flags = [f"--config.{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "shortcut_jax.train", "--config=configs/digits.py", f"--workdir={workdir}", *flags]
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    begin, before = time.perf_counter(), used()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the run failed:\n{done.stderr}")
    wall = time.perf_counter() - begin
    return Spent(wall, used() - before, read_lines(workdir / "goodput.jsonl")[-1]["seconds"]["saving"])


def main() -> None:
    """Runs both in turn, prints, and fails above the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--limit", type=float, default=1.10, help="of the median ratio")
    parser.add_argument("--data_dir", default=None, help="where the digits are; the config's place by default")
    parser.add_argument("--dir", default=None, help="where the workdirs are made for the while")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}, {options.steps} steps, a save every {options.every}")
    folder = Path(tempfile.mkdtemp(dir=options.dir))
    ratios = []
    try:
        spent(folder / "first", 2, 0, options.data_dir)  # files in the page cache, the digits prepared
        for turn in range(options.turns):
            without = spent(folder / f"without-{turn}", options.steps, 0, options.data_dir)
            saving = spent(folder / f"saving-{turn}", options.steps, options.every, options.data_dir)
            ratios.append(saving.wall / without.wall)
            print(
                f"saving {saving.wall:.1f} s, without {without.wall:.1f} s: {ratios[-1]:.3f} x; of the processors "
                f"{saving.cpu:.1f} s and {without.cpu:.1f} s: {saving.cpu / without.cpu:.3f} x; blocked in saves "
                f"{saving.blocked:.1f} s and {without.blocked:.1f} s",
                flush=True,
            )
    finally:
        shutil.rmtree(folder)
    ratio = statistics.median(ratios)
    print(f"median {ratio:.3f} x, limit {options.limit:.2f} x")
    sys.exit(ratio > options.limit)


if __name__ == "__main__":
    main()
