"""Memory and speed of conversion: `python -m benchmarks.measure_conversion [--direction=in|out|merge] [--double=3]`.

A synthetic FLUX.1 of full width in bfloat16 is written as one file in Black Forest Labs' layout. `in` converts it to
Orbax, `out` the Orbax folder back to such a file, and `merge` adds a LoRA of rank 16 from file to file. Each runs in a
process of its own, with a `sync` behind it; start-up is not counted. Memory is the peak resident set of that process
(VmHWM). `in` is compared with Orbax alone saving the same tensors from memory, in turn (left out by --memory-only: it
takes three times the model).

Fails where the peak is above 1.5 times the largest stacked tensor + 2 GB, or the rate below 70% of Orbax alone.
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
from shortcut_jax.formats import export
from shortcut_jax.formats.safetensors import remove
from shortcut_jax.models.presets import preset
from shortcut_jax.sources.models import abstract_params, open_models
from shortcut_jax.weights import flux_bfl, lora
from shortcut_jax.weights.lora_files import to_peft
from shortcut_jax.weights.params import Params, Spec
from shortcut_jax.weights.rules import nest

MIN_RATE = 0.7  # of Orbax alone
RANK = 16


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


def _write_lora(file, shapes):
    """Adapters of every module, about as large as those that are trained."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: (0.01 * rng.standard_normal(shape, np.float32)).astype(ml_dtypes.bfloat16)
    modules = {}
    for name, unit, _ in lora.expand(shapes):
        inputs, outputs = lora.sizes(unit, shapes)
        modules[name] = lora.Factors(draw(RANK, inputs), draw(outputs, RANK), float(RANK))
    export.write_tensors(file, *to_peft(modules))


def _peak_gb():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def _child(kind, source, target, *arguments):
    """One measurement; prints seconds and peak memory as JSON."""
    import orbax.checkpoint.experimental.v1 as ocp

    if kind == "convert":
        begin = time.perf_counter()
        code = convert.main(["convert", f"--from={source}", f"--to={target}", *arguments])
        assert code == 0
    else:
        (model,) = open_models(Path(source))
        tree = nest(dict(model.params))
        os.sync()
        begin = time.perf_counter()
        ocp.save(Path(target), tree)
    os.sync()
    print(json.dumps([time.perf_counter() - begin, _peak_gb()]))


def _measure(kind, size, source, target, *arguments):
    argv = [sys.executable, "-m", "benchmarks.measure_conversion", "--child", kind, source, target, *arguments]
    out = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, peak = json.loads(out.splitlines()[-1])
    print(f"{kind:8} {seconds:6.1f} s, {size / seconds:.2f} GB/s, peak memory {peak:.2f} GB", flush=True)
    return seconds, peak


def _copy(size, source, target):
    begin = time.perf_counter()
    shutil.copyfile(source, target)
    os.sync()
    seconds = time.perf_counter() - begin
    print(f"cp, sync {seconds:6.1f} s, {size / seconds:.2f} GB/s", flush=True)
    target.unlink()


def _prepare(direction, folder, shapes):
    """Writes what is converted. Returns it, where it goes, and further arguments."""
    noise, source = Noise(shapes), folder / "flux.safetensors"
    export.write_file(source, [export.Part(noise, flux_bfl.RULES)], lambda n: None)
    if direction == "in":
        return source, folder / "orbax", ()
    if direction == "merge":
        _write_lora(folder / "lora.safetensors", shapes)
        return source, folder / "merged.safetensors", ("--format=bfl", f"--lora={folder / 'lora.safetensors'}")
    print("first to Orbax:")
    _measure("convert", source.stat().st_size / 1e9, source, folder / "orbax")
    print("and back:")
    source.unlink()
    return folder / "orbax", folder / "back.safetensors", ("--format=bfl",)


def _run(options, folder):
    cfg = dataclasses.replace(preset("flux-dev"), double_blocks=options.double, single_blocks=options.single)
    shapes = {k: tuple(v.shape) for k, v in flat_paths(abstract_params("flux", cfg)).items()}
    specs = Noise(shapes)
    size = sum(specs.spec(k).nbytes for k in specs) / 1e9
    largest = max(specs.spec(k).nbytes for k in specs) / 1e9
    limit = 1.5 * largest + 2
    print(f"{size:.2f} GB, largest stacked tensor {largest:.2f} GB: the limit is {limit:.2f} GB of memory", flush=True)
    source, target, arguments = _prepare(options.direction, folder, shapes)
    peaks, ratios = [], []
    for _ in range(options.runs):
        seconds, peak = _measure("convert", size, source, target, *arguments)
        peaks.append(peak)
        remove(target)
        if options.direction == "in" and not options.memory_only:
            alone, _ = _measure("orbax", size, source, folder / "alone")
            remove(folder / "alone")
            ratios.append(alone / seconds)
        if source.is_file():
            _copy(size, source, folder / "copy")
    assert max(peaks) <= limit, f"the limit of {limit:.2f} GB is missed: {max(peaks):.2f} GB"
    if ratios:
        print(f"rate of conversion / rate of Orbax alone: {', '.join(f'{r:.2f}' for r in ratios)}")
        assert min(ratios) >= MIN_RATE, f"less than {MIN_RATE:.0%} of the rate of Orbax alone"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--direction", choices=("in", "out", "merge"), default="in")
    parser.add_argument("--double", type=int, default=3)
    parser.add_argument("--single", type=int, default=8)
    parser.add_argument("--folder", default="/tmp/measure")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--memory-only", action="store_true")
    parser.add_argument("--child", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if options.child:
        return _child(*options.child)
    folder = Path(options.folder)
    folder.mkdir(parents=True)
    try:
        _run(options, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
