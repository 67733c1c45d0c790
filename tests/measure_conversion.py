"""Memory and speed of conversion: `python -m tests.measure_conversion [--double=3] [--single=6]`.

A synthetic FLUX.1 of full width in bfloat16 is written as one file in Black Forest Labs' layout. Then, in turn and each
in a process of its own: the conversion to Orbax, Orbax alone saving the same tensors from memory, and `cp`; each with a
`sync` behind it. Start-up is not counted. Memory is the peak resident set of the converting process (VmHWM).
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import ml_dtypes
import numpy as np

from shortcut_jax import convert
from shortcut_jax.core.tree import flat_paths
from shortcut_jax.models.presets import preset
from shortcut_jax.runtime import exported
from shortcut_jax.sources import abstract_params, open_models
from shortcut_jax.weights import flux_bfl
from shortcut_jax.weights.params import Params, Spec
from shortcut_jax.weights.rules import nest


class Noise(Params):
    """Random parameters that need not fit in memory."""

    def __init__(self, shapes):
        self._shapes = shapes
        self._bits = np.random.default_rng(0).integers(0, 2**14, 2**24, np.uint16)

    def spec(self, name):
        return Spec(np.dtype(ml_dtypes.bfloat16), self._shapes[name])

    def __getitem__(self, name):
        return np.resize(np.roll(self._bits, len(name)), self._shapes[name]).view(ml_dtypes.bfloat16)

    def __iter__(self):
        return iter(self._shapes)

    def __len__(self):
        return len(self._shapes)


def _peak_gb():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def _child(kind, source, target):
    """One measurement; prints seconds and peak memory as JSON."""
    import orbax.checkpoint.experimental.v1 as ocp

    if kind == "convert":
        begin = time.perf_counter()
        convert.main(["convert", f"--from={source}", f"--to={target}"])
    else:
        (model,) = open_models(Path(source))
        tree = nest(dict(model.params))
        os.sync()
        begin = time.perf_counter()
        ocp.save(Path(target), tree)
    os.sync()
    print(json.dumps([time.perf_counter() - begin, _peak_gb()]))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--double", type=int, default=3)
    parser.add_argument("--single", type=int, default=6)
    parser.add_argument("--folder", default="/tmp/measure")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--child", nargs=3)
    options = parser.parse_args()
    if options.child:
        return _child(*options.child)
    cfg = dataclasses.replace(preset("flux-dev"), double_blocks=options.double, single_blocks=options.single)
    shapes = {k: tuple(v.shape) for k, v in flat_paths(abstract_params("flux", cfg)).items()}
    folder = Path(options.folder)
    folder.mkdir(parents=True)
    noise, source = Noise(shapes), folder / "flux.safetensors"
    exported.write_file(source, [exported.Part(noise, flux_bfl.RULES)], lambda n: None)
    size = source.stat().st_size / 1e9
    largest = max(noise.spec(k).nbytes for k in noise) / 1e9
    print(f"{size:.2f} GB, largest stacked tensor {largest:.2f} GB: the limit is {1.5 * largest + 2:.2f} GB of memory")
    ratios = []
    for _ in range(options.runs):
        seconds = {}
        for kind in ("convert", "orbax"):
            argv = [sys.executable, "-m", "tests.measure_conversion", "--child", kind, source, folder / kind]
            out = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
            seconds[kind], peak = json.loads(out.splitlines()[-1])
            print(f"{kind:8} {seconds[kind]:6.1f} s, {size / seconds[kind]:.2f} GB/s, peak memory {peak:.2f} GB")
            shutil.rmtree(folder / kind)
        begin = time.perf_counter()
        shutil.copyfile(source, folder / "copy")
        os.sync()
        print(f"cp, sync {time.perf_counter() - begin:6.1f} s, {size / (time.perf_counter() - begin):.2f} GB/s")
        (folder / "copy").unlink()
        ratios.append(seconds["orbax"] / seconds["convert"])
    print(f"rate of conversion / rate of Orbax alone: {', '.join(f'{r:.2f}' for r in ratios)}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
