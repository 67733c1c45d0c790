"""Evaluation: `python -m shortcut_jax.evaluate --workdir=W`, or of a converted pipeline with `--checkpoint=FOLDER`.

Writes `evaluation.html` and `evaluation.json`. The first view is judged in full, the others at fewer step counts and on
fewer images. Rerun the same command to resume what was cut off.
"""

import math
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_jax import cli
from shortcut_jax.cluster import distributed
from shortcut_jax.cluster.claim import Claim
from shortcut_jax.cluster.distributed import say
from shortcut_jax.cluster.shared_folder import check_folder, check_place
from shortcut_jax.config.bounds import MAX_STEPS
from shortcut_jax.core.stats import clip_score
from shortcut_jax.data.format import Size
from shortcut_jax.data.text_file import read_lines
from shortcut_jax.errors import UsageError
from shortcut_jax.evaluation.captions import CaptionedSet
from shortcut_jax.evaluation.digits import classifier
from shortcut_jax.evaluation.features import MAX_PIXELS, Features, inception, load_clip, pixels, random_network
from shortcut_jax.evaluation.reference import open_reference, save_reference
from shortcut_jax.evaluation.resize import RESIZES
from shortcut_jax.evaluation.run import EXTRAS, Plan, entries_of, evaluate
from shortcut_jax.evaluation.sampling import Judges
from shortcut_jax.evaluation.set_network import network_classes, network_features, network_of
from shortcut_jax.evaluation.subjects import CHECKPOINT, ConvertedSubject, RunSubject, Subject
from shortcut_jax.evaluation.writing import write
from shortcut_jax.formats.inference_checkpoint import RECORD
from shortcut_jax.inference.request import SampleRequest
from shortcut_jax.runtime.compilation_cache import keep_programs
from shortcut_jax.sources.models import with_strengths

USAGE = "usage: python -m shortcut_jax.evaluate --workdir=W|--checkpoint=FOLDER [--steps=1,2,4] [--views=slow,online]"
ONLY_WITH = {
    "workdir": (),
    "checkpoint": ("prompts", "height", "width", "text_tokens", "lora", "lora_scale", "matmul_dtype"),
}
"""What is judged -> the options that go with it only."""
OF_A_REFERENCE = {"save_reference", "reference", "features", "inception", "resize"} | {
    *("coordinator", "num_processes", "process_id", "join_timeout")
}
"""The options that `--save_reference` uses."""
FEATURES = ("auto", "inception", "pixels", "random", "network")


def main(argv: Sequence[str]) -> int:
    """Parses the command line, makes and judges the images, and writes the page."""
    options = cli.parse(_flags(), argv, USAGE)
    chosen = (cli.whole_numbers(name, getattr(options, name), 1, 1000) for name in ("steps", "other_steps"))
    steps, other_steps = (sorted(set(numbers)) for numbers in chosen)
    _check(options)
    loras = with_strengths(options.lora, options.lora_scale)
    if options.save_reference is not None:
        out = Path(options.save_reference).parent
        check_place(Path(options.save_reference), "--save_reference", folder=False)
    else:
        out = Path(options.out or _default_out(options))
        check_place(out, "--out")
    place = options.coordinator, options.num_processes, options.process_id, options.join_timeout
    distributed.initialize(*place)
    keep_programs()
    if options.save_reference is not None:
        features = choose_features(options, None)
        reference = open_reference(options.reference, None, features, out)
        save_reference(Path(options.save_reference), reference, features)
        say(f"{features.name} of {reference.num_images:,} {reference.source}: {options.save_reference}")
        return 0
    with Claim(out, "--out") as claim:
        top = max(*steps, *other_steps, options.teacher_steps)
        subjects: list[Subject] = [open_run(options, path, top) for path in options.workdir or ()]
        if options.checkpoint:
            subjects = [open_checkpoint(options, options.checkpoint, loras)]
        teacher = open_teacher(options, subjects[0], top) if options.teacher else None
        views = options.views or (["slow", "online", "fast"] if options.workdir else [CHECKPOINT])
        images = options.images, other_steps, options.other_images
        plan = Plan(views, steps, *images, options.teacher_steps, options.seed, options.extras)
        entries = entries_of(subjects, teacher, plan)
        check_folder(out, "--out")
        claim.take()
        own = subjects[0].captioned if isinstance(subjects[0], RunSubject) else None
        clip = clip_scores(options.clip) if options.clip else None
        shape = own.images([0]).shape[1:] if own else None
        if options.features == "network":
            beside = pixels(shape) if options.reference is None and shape and math.prod(shape) <= MAX_PIXELS else None
            judges = own_network(own, out)._replace(clip=clip, pixels=beside)
        else:
            judges = Judges(choose_features(options, shape), clip, classifier(own))
        reference = open_reference(options.reference, own, judges.features, out)
        if judges.pixels:
            reference = reference._replace(pixels=open_reference(None, own, judges.pixels, out).gaussian)
        write(evaluate(entries, plan, judges, reference, out), out)
    return 0


def _flags() -> Any:
    from absl import flags

    values = cli.new_flags()
    text, number = flags.DEFINE_string, flags.DEFINE_integer
    flags.DEFINE_multi_string("workdir", None, "Folder of a training run; several side by side.", flag_values=values)
    text("checkpoint", None, "Converted pipeline, instead of a workdir.", flag_values=values)
    flags.DEFINE_list("steps", ["1", "2", "3", "4", "8", "32"], "Sampling step counts.", flag_values=values)
    flags.DEFINE_list("views", None, "Weights: slow,online,fast; the first one in full.", flag_values=values)
    number("images", 0, "Images of a cell; 0: as many as there are captions.", flag_values=values)
    flags.DEFINE_list("other_steps", ["1", "4", "32"], "Step counts of the views but the first.", flag_values=values)
    number("other_images", 512, "Images per cell of the other views; 0: as the first.", flag_values=values)
    text("teacher", None, "Workdir or pipeline to compare with; a run's own by default.", flag_values=values)
    number("teacher_steps", 32, "Sampling steps of the teacher.", flag_values=values)
    flags.DEFINE_enum("features", "auto", FEATURES, "What the distance is computed on.", flag_values=values)
    text("inception", None, "Converted InceptionV3 (pt_inception-2015-12-05), for FID.", flag_values=values)
    flags.DEFINE_enum("resize", RESIZES[0], RESIZES, "How images get Inception's size.", flag_values=values)
    text("clip", None, "Converted CLIP with both towers, for the CLIP score.", flag_values=values)
    text("reference", None, "Statistics (.npz), or a folder of images; else the run's set.", flag_values=values)
    text("save_reference", None, "Only write the statistics of --reference to this .npz.", flag_values=values)
    text("prompts", None, "With --checkpoint: file with a prompt a line.", flag_values=values)
    flags.DEFINE_list("extras", list(EXTRAS), "Further measurements.", flag_values=values)
    number("seed", 0, "Seed of the noise.", flag_values=values)
    number("batch_size", 256, "Images made at once.", flag_values=values)
    flags.DEFINE_float("guidance", None, "Guidance scale; by default that of the run.", flag_values=values)
    flags.DEFINE_float("shift", None, "Timestep shift; by default that of the run.", flag_values=values)
    for name in ("height", "width", "text_tokens"):
        number(name, None, "With --checkpoint, as in sample.", flag_values=values)
    flags.DEFINE_multi_string("lora", None, "With --checkpoint: LoRA; several are added up.", flag_values=values)
    cli.define_matmul_dtype(values)
    flags.DEFINE_multi_float("lora_scale", None, "Strength of the adapters, one for each --lora.", flag_values=values)
    text("base", None, "Base of a run's adapters, where it has moved.", flag_values=values)
    text("encoders", None, "Pipeline of a run on latents.", flag_values=values)
    text("data_dir", None, "Folder of the sets; the run's own by default.", flag_values=values)
    text("out", None, "Folder to write; WORKDIR/evaluation by default.", flag_values=values)
    cli.define_place(values)
    return values


def _check(options: types.SimpleNamespace) -> None:
    """Raises UsageError for options that do not go together."""
    if options.save_reference is not None:
        if options.reference is None or options.workdir or options.checkpoint:
            raise UsageError("--save_reference goes with --reference=FOLDER, without a workdir or checkpoint")
        if options.features in ("auto", "network") and options.inception is None:
            raise UsageError("--save_reference needs --inception=FOLDER, or --features=random")
        cli.note_unused(options, "--save_reference", sorted(options.given - OF_A_REFERENCE))
        return
    cli.which_model(options, ONLY_WITH, USAGE)
    cli.check_finite("lora_scale", options.lora_scale or ())
    if options.checkpoint and not options.teacher:
        cli.note_unused(options, "--checkpoint", ("base", "encoders", "data_dir"))
    if options.inception is None:
        cli.note_unused(options, "no --inception", ("resize",))
    if options.checkpoint and not options.prompts:
        raise UsageError("--checkpoint needs --prompts=FILE, a prompt a line")
    for name, least in (("images", 0), ("other_images", 0), ("teacher_steps", 1), ("batch_size", 1), ("seed", 0)):
        if getattr(options, name) < least:
            raise UsageError(f"--{name} is {getattr(options, name)}, but must be at least {least}")
    if options.teacher_steps > MAX_STEPS:
        raise UsageError(f"--teacher_steps is {options.teacher_steps}, but must be at most {MAX_STEPS}")
    unknown = [name for name in options.extras if name not in EXTRAS]
    if unknown:
        raise UsageError(f"--extras has {unknown[0]!r}, but must be of {', '.join(EXTRAS)}")
    if 1 in (options.images, options.other_images):
        raise UsageError("a distance needs at least 2 images: raise --images and --other_images, or give 0 for all")
    if options.features == "inception" and options.inception is None:
        raise UsageError(
            "--features=inception needs --inception=FOLDER: convert pt_inception-2015-12-05 with "
            "python -m shortcut_jax.convert --from=FILE.safetensors --to=FOLDER"
        )


def _default_out(options: types.SimpleNamespace) -> Path:
    if options.checkpoint:
        return Path("runs") / f"evaluation-{Path(options.checkpoint).resolve().name}"
    if len(options.workdir) > 1:
        raise UsageError("several workdirs need --out=FOLDER")
    return Path(options.workdir[0]) / "evaluation"


def choose_features(options: types.SimpleNamespace, shape: tuple[int, ...] | None) -> Features:
    """The features of the distance: Inception's where its weights are given, else pixels or a random network."""
    if options.inception is not None and options.features in ("auto", "inception"):
        return inception(options.inception, options.resize)
    if options.features == "random" or (options.features == "auto" and (not shape or math.prod(shape) > MAX_PIXELS)):
        return random_network(0)
    if shape is None:
        raise UsageError("--features=pixels is for a workdir, whose images have one size: take --features=random")
    return pixels(shape)


def own_network(own: CaptionedSet | None, out: Path) -> Judges:
    """Features and classes of the network of a run's set, kept beside the set, or in `out` where that cannot be."""
    if own is None:
        raise UsageError("--features=network is for a workdir, whose set it learns: take --features=random")
    weights = network_of(own, [own.folder.parent, out])
    return Judges(network_features(weights), classify=network_classes(weights))


def open_run(options: types.SimpleNamespace, workdir: str, max_steps: int) -> RunSubject:
    """A training run, with the options of the command."""
    request = SampleRequest((), guidance=options.guidance, shift=options.shift)
    place = options.base, options.encoders, options.data_dir
    return RunSubject(workdir, max_steps, options.batch_size, request, *place)


def open_checkpoint(
    options: types.SimpleNamespace, folder: str, loras: Sequence[tuple[str, float]] = (), size: Size | None = None
) -> ConvertedSubject:
    """A converted pipeline, with the options of the command; `size` of its images is that of a student's."""
    prompts = read_lines(options.prompts, f"--prompts={options.prompts}") if options.prompts else ()
    names = ("height", "width", "guidance", "shift", "text_tokens")
    chosen = {name: getattr(options, name) for name in names}
    if size is not None:
        chosen["height"], chosen["width"] = size
    return ConvertedSubject(folder, prompts, options.batch_size, chosen, loras, options.matmul_dtype)


def open_teacher(options: types.SimpleNamespace, student: Subject, max_steps: int) -> Subject:
    """What `--teacher` names: a converted pipeline makes images of its student's size."""
    if not (Path(options.teacher) / RECORD).is_file():
        return open_run(options, options.teacher, max_steps)
    size = student.pipeline.size if isinstance(student, RunSubject) else None
    return open_checkpoint(options, options.teacher, size=size)


def clip_scores(folder: str) -> Callable[[np.ndarray, Sequence[str]], np.ndarray]:
    """Images and captions -> the CLIP score of each pair."""
    clip = load_clip(folder)
    return lambda images, captions: clip_score(clip.images(images), clip.texts(captions))


if __name__ == "__main__":
    cli.run(main)
