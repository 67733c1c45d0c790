"""Preparing a data set: `python -m shortcut_jax.prepare --source=images --out=data/set --store=pixels --resolution=64`.

Reads captioned images (a folder in one of several layouts, tar files, or a TFDS set) and writes an ArrayRecord
set that training streams. Rerun the same command to resume after an interruption of any kind.
"""

import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shortcut_jax import cli
from shortcut_jax.cluster.shared_folder import check_place
from shortcut_jax.data.format import INFO, TEXT_DTYPES
from shortcut_jax.data.records import STORES
from shortcut_jax.errors import UsageError
from shortcut_jax.preparation.inputs import NAMES
from shortcut_jax.preparation.jobs import claim, join, prepare, prepare_captions, prepare_from_teacher

USAGE = (
    "usage: python -m shortcut_jax.prepare --source=FOLDER|TARS|tfds:NAME --out=DIR "
    "[--store=pixels|latents --checkpoint=CONVERTED] [--resolution=64] [--buckets=square|aspect|published|64x64,48x80]"
    "; or --from_teacher=CONVERTED --prompts=FILE --per_bucket=N --out=DIR; or --store=captions --prompts=FILE "
    "--checkpoint=CONVERTED --out=DIR; or --inspect=SET"
)


def main(argv: Sequence[str]) -> int:
    """Parses the command line and prepares a set. Returns the exit code."""
    options = cli.parse(define_flags(), argv, USAGE)
    note_unused(options)
    warnings.filterwarnings("ignore", module="PIL")  # what is wrong with an image is reported with its name
    if options.inspect is not None:
        from shortcut_jax.preparation.inspect import inspect

        print("\n".join(inspect(Path(options.inspect), options.out and Path(options.out))))
        return 0
    check_options(options)
    if not (Path(options.out) / INFO).is_file():  # a set that is there may be read only
        check_place(Path(options.out), "--out")
    processes = join("latents" if options.from_teacher else options.store)
    with claim(Path(options.out), processes):
        pass  # a set that another command makes is refused before anything is opened
    if options.from_teacher or options.store != "pixels":
        from shortcut_jax.runtime.compilation_cache import keep_programs

        keep_programs()
    if options.from_teacher:
        return prepare_from_teacher(options, processes)
    return (prepare_captions if options.store == "captions" else prepare)(options, processes)


def define_flags() -> Any:
    """The flags of the command."""
    from absl import flags

    values = cli.new_flags()
    several = flags.DEFINE_multi_string
    flags.DEFINE_string("source", None, "Folder of captioned images, files, or tfds:NAME.", flag_values=values)
    flags.DEFINE_enum("layout", None, NAMES, "How a folder is read that has several layouts.", flag_values=values)
    flags.DEFINE_string("out", None, "Folder of the set to write.", flag_values=values)
    flags.DEFINE_enum("store", "pixels", STORES, "What a record holds.", flag_values=values)
    flags.DEFINE_integer("resolution", 64, "Side of the square whose area images get.", flag_values=values)
    flags.DEFINE_string("buckets", "square", "square, aspect, published, or HxW,HxW,...", flag_values=values)
    flags.DEFINE_boolean("enlarge", True, "Enlarge images smaller than their bucket.", flag_values=values)
    flags.DEFINE_float("validation", 0.01, "Share of the validation split.", flag_values=values)
    flags.DEFINE_float("max_skipped", 0.01, "Largest share that may be left out.", flag_values=values)
    flags.DEFINE_string("eval_prompts", None, "File of prompts for sample grids, one a line.", flag_values=values)
    several("where", None, "field=value that a row of a table must have.", flag_values=values)
    flags.DEFINE_string("caption_field", None, "Field of the caption.", flag_values=values)
    flags.DEFINE_alias("caption", "caption_field", flag_values=values)
    flags.DEFINE_string("template", None, 'Caption from other fields: "a photo of a {label}".', flag_values=values)
    flags.DEFINE_string("tfds_dir", "~/tensorflow_datasets", "Folder of TFDS sets.", flag_values=values)
    flags.DEFINE_integer("unit", None, "Images a shard, where the source has none (4096).", flag_values=values)
    flags.DEFINE_string("checkpoint", None, "Converted pipeline that makes latents.", flag_values=values)
    flags.DEFINE_enum("text_states", "full", ("full", "trimmed"), "T5 states that are stored.", flag_values=values)
    flags.DEFINE_enum("text_dtype", "bfloat16", list(TEXT_DTYPES), "Of the stored T5 states.", flag_values=values)
    flags.DEFINE_integer("text_tokens", 256, "Tokens of a caption for T5.", flag_values=values)
    flags.DEFINE_integer("batch", None, "Images that a device encodes (8) or samples (1).", flag_values=values)
    flags.DEFINE_string("from_teacher", None, "Converted pipeline that samples the set.", flag_values=values)
    flags.DEFINE_string("prompts", None, "File of prompts or captions, one a line.", flag_values=values)
    flags.DEFINE_integer("per_bucket", None, "With --from_teacher: images of each size.", flag_values=values)
    flags.DEFINE_integer("steps", 32, "With --from_teacher: sampling steps.", flag_values=values)
    flags.DEFINE_float("guidance", 3.5, "With --from_teacher: guidance scale.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "With --from_teacher: seed of the noise.", flag_values=values)
    several("lora", None, "With --from_teacher: adapters to merge into it.", flag_values=values)
    flags.DEFINE_multi_float("lora_scale", None, "Strength of each --lora.", flag_values=values)
    flags.DEFINE_string("inspect", None, "Set to inspect; a sheet of its images goes to --out.", flag_values=values)
    return values


def check_options(options: types.SimpleNamespace) -> None:
    """Refuses flags that are missing or do not go together, and numbers that make no sense.

    Raises:
      UsageError: there is one.
    """
    if options.from_teacher:
        needed: tuple[str, ...] = ("out", "prompts", "per_bucket")
    else:
        needed = {
            "pixels": ("source", "out"),
            "latents": ("source", "out", "checkpoint"),
            "captions": ("out", "prompts", "checkpoint"),
        }[options.store]
    for name in needed:
        if getattr(options, name) is None:
            raise UsageError(f"--{name} is missing; {USAGE}")
    of_sources = ("source", "checkpoint", "where", "caption_field", "template", "layout")
    if options.from_teacher and (any(getattr(options, n) for n in of_sources) or options.text_states != "full"):
        raise UsageError(f"--{', --'.join(of_sources)} and --text_states do not go with --from_teacher")
    if options.from_teacher and options.store == "captions":
        raise UsageError("--store=captions has no images to sample: give --checkpoint in place of --from_teacher")
    if options.store == "captions" and options.source:
        raise UsageError("--source does not go with --store=captions: name a file of captions with --prompts")
    for name in ("validation", "max_skipped"):
        if not 0 <= getattr(options, name) <= 1:
            raise UsageError(f"--{name} is {getattr(options, name):g}, but is a share, from 0 to 1")
    for name in ("unit", "resolution", "batch", "text_tokens"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UsageError(f"--{name} is {getattr(options, name)}, but must be at least 1")


OF_A_TEACHER = ("prompts", "per_bucket", "steps", "guidance", "seed", "lora", "lora_scale")
OF_A_SOURCE = ("layout", "enlarge", "where", "caption_field", "template", "tfds_dir")
OF_LATENTS = ("checkpoint", "text_states", "text_dtype", "text_tokens", "batch")


def note_unused(options: types.SimpleNamespace) -> None:
    """Says which flags are given for nothing."""
    if options.inspect is not None:
        cli.note_unused(options, "--inspect", sorted(options.given - {"inspect", "out"}))
    elif options.from_teacher:
        cli.note_unused(options, "--from_teacher", (*OF_A_SOURCE, *(["store"] if options.store == "pixels" else [])))
    elif options.store == "captions":
        cli.note_unused(options, "--store=captions", (*OF_A_SOURCE, *OF_A_TEACHER[1:], "buckets", "resolution"))
    else:
        cli.note_unused(options, "--source, without --from_teacher", OF_A_TEACHER)
        cli.note_unused(options, f"--store={options.store}", OF_LATENTS if options.store == "pixels" else ())


if __name__ == "__main__":
    cli.run(main)
