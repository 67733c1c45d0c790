"""Sampling: `python -m shortcut_jax.sample --workdir=W --prompt="a handwritten digit seven" --out=seven.png`.

With `--checkpoint=FOLDER` instead of a workdir it samples a converted pipeline. Prompts come from `--prompt`, a file
or, with `--interactive`, from the keyboard. `--edit=in.png` changes an image instead.
"""

import dataclasses
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from shortcut_jax import cli
from shortcut_jax.cluster import distributed
from shortcut_jax.cluster.distributed import say, tell
from shortcut_jax.config.bounds import MAX_STEPS, check_prompts
from shortcut_jax.core.flow import METHODS
from shortcut_jax.data.text_file import read_lines
from shortcut_jax.errors import UsageError
from shortcut_jax.inference.batches import fit_image, read_edited, sample_to_files
from shortcut_jax.inference.converted_pipeline import TextToImage
from shortcut_jax.inference.image_files import Output, names_folder
from shortcut_jax.inference.repl import interact
from shortcut_jax.inference.request import Edit, ImagePipeline, SampleRequest
from shortcut_jax.inference.run_pipeline import Pipeline
from shortcut_jax.runtime.compilation_cache import keep_programs
from shortcut_jax.sources.models import with_strengths
from shortcut_jax.steps.editing import make_plan
from shortcut_jax.steps.networks import VIEWS

USAGE = (
    "usage: python -m shortcut_jax.sample --workdir=W|--checkpoint=FOLDER "
    '--prompt="..."|--prompts=FILE|--interactive [--steps=4] [--num=1] [--out=samples.png|folder/]'
)
SEVERAL = 16
"""Images a prompt that a workdir gives by default, where they are not one file of one prompt."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "workdir": {"view": "slow", "base": None, "encoders": None},
    "checkpoint": {"text_tokens": None, "lora": [], "height": None, "width": None, "matmul_dtype": None},
}
"""What is sampled -> the options that go with it only."""


def main(argv: Sequence[str]) -> int:
    """Parses the command line, samples or edits, and writes PNGs."""
    options = _parse(argv)
    request = _request(options)
    request.check()
    cli.check_finite("lora_scale", options.lora_scale or ())
    image = None if options.edit is None else _image_to_edit(options)
    output = Output(options.out, count_on=options.interactive)
    if options.interactive and not output.is_folder:
        raise UsageError(f"--out={options.out}: --interactive needs a folder, such as --out=samples/")
    distributed.initialize()
    keep_programs()
    model = _open(options, request)
    if options.interactive:
        interact(model, request, output, options.trajectory)
        return 0
    if image is not None:
        pixels_hwc = fit_image(model, image, request)
        rows, columns = pixels_hwc.shape[:2]
        request = dataclasses.replace(request, height=rows, width=columns, edit=_edit(options, pixels_hwc))
    for note in model.notes(request):
        say(note)
    sample_to_files(model, request, output, options.trajectory)
    return 0


def _open(options: SimpleNamespace, request: SampleRequest) -> ImagePipeline:
    """The model, its weights on the devices."""
    begin = time.perf_counter()
    if options.checkpoint is None:
        scales = options.lora_scale or [1.0]
        if len(scales) > 1:
            raise UsageError(f"--lora_scale is given {len(scales)} times, but a workdir has one set of adapters")
        size = request.batch_size or min(request.num * max(len(request.prompts), 1), 64)
        chosen = options.view, MAX_STEPS, size, options.base, scales[0], options.encoders
        model: ImagePipeline = Pipeline(options.workdir, *chosen)
        model.check(request)
    else:
        loras = with_strengths(options.lora, options.lora_scale)
        model = converted = TextToImage(options.checkpoint, loras=loras, matmul_dtype=options.matmul_dtype)
        model.check(request)
        for part in converted.models.values():
            say(part.origin)
            tell(part.notes)
        begin = time.perf_counter()
        model.weights()
    say(f"weights read in {time.perf_counter() - begin:.1f} s; the first images of a size wait for their program")
    return model


def _parse(argv: Sequence[str]) -> SimpleNamespace:
    """The options with the defaults of what is sampled.

    Raises:
      UsageError: neither or both of workdir and checkpoint, or an option that does not go with it.
    """
    options = cli.parse(_flags(), argv, USAGE)
    kind = cli.which_model(options, DEFAULTS, USAGE)
    for name, value in DEFAULTS[kind].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.out is None:
        options.out = "samples/" if options.interactive else "samples.png"
    return options


def _flags() -> Any:
    from absl import flags

    values = cli.new_flags()
    string = lambda name, text, default=None: flags.DEFINE_string(name, default, text, flag_values=values)
    integer = lambda name, text, default=None: flags.DEFINE_integer(name, default, text, flag_values=values)
    number = lambda name, text: flags.DEFINE_float(name, None, text, flag_values=values)
    string("workdir", "Folder of a training run.")
    string("checkpoint", "Converted pipeline, instead of a workdir.")
    flags.DEFINE_multi_string("prompt", None, "Caption; give it several times for several rows.", flag_values=values)
    string("prompts", "File of prompts, one a line, UTF-8.")
    flags.DEFINE_boolean("interactive", False, "Read prompts from the keyboard.", flag_values=values)
    integer("steps", "Sampling steps.", 4)
    integer(
        "num",
        f"Images a prompt. By default one for each of --seeds; else 1, but {SEVERAL} where a --workdir is sampled into "
        "a folder or for several prompts.",
    )
    integer("seed", "Seed of the noise.", 0)
    flags.DEFINE_list("seeds", [], "A seed for each of a prompt's images: 1,2,3.", flag_values=values)
    number("guidance", "Guidance scale; that of the run by default. Without a guidance embedding 0 and 1 mean none.")
    number("shift", "Timestep shift; by default that of the run or pipeline.")
    flags.DEFINE_enum(
        "method", "euler", list(METHODS), "Heun evaluates twice a step, once in the last.", flag_values=values
    )
    integer("batch", "Images sampled at once.")
    integer("height", "With --checkpoint: of an image in pixels (1024).")
    integer("width", "With --checkpoint: of an image in pixels (1024).")
    cli.define_matmul_dtype(values)
    integer("text_tokens", "With --checkpoint: tokens of a prompt for T5.")
    flags.DEFINE_enum("view", None, VIEWS, "With --workdir: online, or the fast or slow EMA.", flag_values=values)
    string("base", "With --workdir: base of its adapters, where it has moved.")
    string("encoders", "With --workdir: converted pipeline that encodes and decodes for a run on latents.")
    flags.DEFINE_multi_string("lora", None, "With --checkpoint: LoRA; several are added up.", flag_values=values)
    flags.DEFINE_multi_float("lora_scale", None, "Strength of the adapters, one for each --lora.", flag_values=values)
    string("out", "File (.png, .jpg, .webp), or a folder ending in / that gets a PNG an image and sheet.png.")
    flags.DEFINE_boolean("trajectory", False, "Also write the clean image predicted at each step.", flag_values=values)
    string("edit", "Image to change from what --source_prompt says to what --prompt says (FlowEdit).")
    string("source_prompt", "With --edit: what the image shows.")
    number("source_guidance", "With --edit: guidance scale for --source_prompt; that of --guidance by default.")
    integer("skip", "With --edit: first steps left out; the more, the closer to the image.", 0)
    integer("plain", "With --edit: last steps that only follow --prompt.", 0)
    integer("average", "With --edit: noises averaged in each step.", 1)
    return values


def _request(options: SimpleNamespace) -> SampleRequest:
    """What the options ask for. Raises UsageError where they contradict each other."""
    prompts = [
        *(options.prompt or ()),
        *(read_lines(options.prompts, f"--prompts={options.prompts}") if options.prompts is not None else ()),
    ]
    if not prompts and not options.interactive:
        raise UsageError(f"--prompt is missing; {USAGE}")
    if prompts and options.interactive:
        raise UsageError("give --interactive or prompts, not both")
    try:
        seeds = tuple(int(text) for text in options.seeds)
    except ValueError as error:
        raise UsageError(f"--seeds={','.join(options.seeds)[:80]}, but must be whole numbers") from error
    if seeds and options.num not in (None, len(seeds)):
        raise UsageError(f"--num is {options.num}, but there are {len(seeds)} --seeds: leave --num out")
    if options.num is None:
        options.num = len(seeds) or _default_num(options, len(prompts))
    same = ("num", "steps", "guidance", "seed", "method", "shift", "height", "width", "text_tokens")
    chosen = {name: getattr(options, name) for name in same}
    return SampleRequest(tuple(prompts), seeds=seeds, batch_size=options.batch, **chosen)


def _default_num(options: SimpleNamespace, prompts: int) -> int:
    one = options.checkpoint is not None or options.edit is not None or options.interactive
    return 1 if one or (prompts == 1 and not names_folder(options.out)) else SEVERAL


def _image_to_edit(options: SimpleNamespace) -> Image.Image:
    """The image of `--edit`. Raises UsageError for what an edit cannot do, before weights are read."""
    if options.source_prompt is None:
        raise UsageError("--source_prompt is missing: say what the image of --edit shows")
    check_prompts([options.source_prompt])
    if len(options.prompt or ()) != 1 or options.prompts is not None or options.interactive:
        raise UsageError("--edit takes one --prompt: what the image is to become")
    if options.method != "euler" or options.trajectory:
        raise UsageError("--edit goes neither with --method=heun nor with --trajectory")
    if (options.height is None) != (options.width is None):
        raise UsageError("--edit takes both of --height and --width, or the size of the image")
    try:
        make_plan(options.steps, options.skip, options.plain, options.average)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return read_edited(options.edit)


def _edit(options: SimpleNamespace, pixels_hwc: np.ndarray) -> Edit:
    plan = options.skip, options.plain, options.average
    return Edit(pixels_hwc, options.source_prompt, *plan, source_guidance=options.source_guidance)


if __name__ == "__main__":
    cli.run(main)
