"""A seven becomes a one: `python -m benchmarks.edit_digits --workdir=W --out=docs/edit [--steps=8] [--skip=1]`.

Every real seven is edited by FlowEdit with the few-step model. Two figures of the result: the share that a support
vector machine fitted on the real digits takes for ones, and the mean distance to the seven that it came from
(Euclidean, pixels in [-1, 1]); beside them those of ones that are sampled afresh. Writes OUT.md and OUT.png.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np

from shortcut_jax import Pipeline
from shortcut_jax.core.text import markdown
from shortcut_jax.data.datasets.digits import caption
from shortcut_jax.data.records import open_source, to_latents
from shortcut_jax.evaluation.digits import make_reference
from shortcut_jax.runtime.metrics import contact_sheet


def distance(a, b):
    """Mean Euclidean distance of images in pairs."""
    return np.linalg.norm((to_latents(a) - to_latents(b)).reshape(len(a), -1), axis=1).mean()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--before", type=int, default=7)
    parser.add_argument("--after", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--skips", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--shown", type=int, default=1, help="steps skipped in the image")
    parser.add_argument("--columns", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    pipeline = Pipeline(options.workdir, max_steps=options.steps, batch_size=256)
    source = open_source(pipeline.settings.data)
    reference = make_reference(source)
    digits = np.stack([r["image"] for r in source])[reference.labels == options.before]
    before, after = caption(options.before), caption(options.after)
    numbers = range(len(digits))

    def row(name, make):
        images = np.concatenate([make([(seed, i) for i in numbers]) for seed in range(options.seeds)])
        sources, classes = np.concatenate([digits] * options.seeds), reference.classify(images)
        shares = [f"{np.mean(classes == digit):.3f}" for digit in (options.after, options.before)]
        print(name, *shares, flush=True)
        return images, [name, *shares, f"{distance(images, sources):.2f}"]

    edit = lambda skip: lambda draws: pipeline.edit(digits, before, after, options.steps, skip, draws=draws)
    fresh = lambda draws: pipeline([after] * len(draws), options.steps, draws=draws)
    edited = {skip: row(f"edited, {skip} of {options.steps} steps skipped", edit(skip)) for skip in options.skips}
    rows = [r for _, r in edited.values()] + [row(f"sampled afresh in {options.steps} steps", fresh)[1]]
    head = ["", f"taken for a {options.after}", f"still for a {options.before}", "distance to the source"]
    facts = (
        f"{len(digits)} images, {options.seeds} noise seeds; {pipeline.settings.objective}, step {pipeline.step}; "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, {time.strftime('%Y-%m-%d')}"
    )
    body = markdown([head, *rows])
    Path(f"{options.out}.md").write_text(f"{body}\n\n{facts}\n")
    print(f"{body}\n\n{facts}")
    shown = [digits[: options.columns], edited[options.shown][0][: options.columns]]
    contact_sheet(shown, ["source", "edited"]).save(f"{options.out}.png")


if __name__ == "__main__":
    main()
