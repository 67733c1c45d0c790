"""Distilling guidance without burning colours: `python -m benchmarks.compare_guidance [--steps=600] [--scale=3]`.

A student with a guidance embedding is post-trained on the digits' teacher, which has none, in two ways: the scale
enters the teacher's jump only (`guidance_mode=distill`), or every jump (`guidance_mode=cfg_targets`, the naive way).
Printed as training goes on: mean absolute pixel value and contrast (standard deviation of an image's pixels, in
[-1, 1]) of images sampled in few steps at one scale, beside those of the teacher with classifier-free guidance in 32
steps, and of the data.
"""

import argparse
from pathlib import Path

import numpy as np

from benchmarks.compare_restarts import SETTINGS
from shortcut_jax import train
from shortcut_jax.core.text import markdown
from shortcut_jax.data.records import DataSettings, open_source, to_latents
from shortcut_jax.evaluation.digits import make_reference
from shortcut_jax.inference.run_pipeline import Pipeline
from shortcut_jax.inference.sheets import grid_captions


def saturation(images):
    """Mean absolute pixel value, and contrast, of images in 8 bits."""
    x = to_latents(np.asarray(images)).reshape(len(images), -1)
    return f"{np.abs(x).mean():.3f} / {x.std(axis=1).mean():.3f}"


def _trained(mode, stop, options):
    argv = ["train", "--config=configs/digits_distill.py", f"--workdir={options.folder}/{mode}", f"--stop_at={stop}"]
    argv += [f"--config.init_from={options.teacher}", f"--config.guidance_mode={mode}", "--config.model.guidance=true"]
    argv += [f"--config.guidance=(1.0,{options.scale + 1})", f"--config.steps={options.steps}"]
    argv += [f"--config.batch_size={options.batch}", "--config.eval.views=()", "--config.eval.images=()"]
    argv += ["--config.eval.steps=(1,)", *(f"--config.{change}" for change in SETTINGS["distil"])]
    if train.main(argv):
        raise SystemExit("interrupted")
    return Pipeline(Path(options.folder) / mode, max_steps=32, batch_size=256)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--scale", type=float, default=3.0)
    parser.add_argument("--count", type=int, default=4, help="sampling steps of the student")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--teacher", default="runs/digits-teacher")
    parser.add_argument("--folder", default="runs/guidance")
    options = parser.parse_args()
    stops = [options.steps * k // 4 for k in range(1, 5)]
    students = {mode: [] for mode in ("distill", "cfg_targets")}
    source = open_source(DataSettings())
    captions = grid_captions((), make_reference(source).captions, options.images)
    draw = lambda p, n, scale: p.generate(p.params, captions, n, guidance=scale)
    for mode, cells in students.items():
        for stop in stops:
            pipeline = _trained(mode, stop, options)
            cells.append(saturation(draw(pipeline, options.count, options.scale)))
            print(f"guidance_mode={mode}, step {stop}: {cells[-1]}", flush=True)
    teacher = Pipeline(options.teacher, max_steps=32, batch_size=256)
    guided = saturation(draw(teacher, 32, options.scale))
    plain = saturation(draw(teacher, 32, 1.0))
    rows = [["mean abs / contrast", *(f"step {s}" for s in stops)]]
    rows += [[f"guidance_mode={mode}", *cells] for mode, cells in students.items()]
    print(f"\n{markdown(rows)}\n\nteacher, 32 steps: {guided} at scale {options.scale:g}, {plain} without guidance")
    print(f"data: {saturation(np.stack([r['image'] for r in source]))}")


if __name__ == "__main__":
    main()
