"""Weights in and out: `python -m shortcut_jax.convert --from=flux1-dev.safetensors --to=flux1-dev [--format=orbax]`.

Reads PyTorch checkpoints (Black Forest Labs, ComfyUI, diffusers), LoRA files, converted folders and training workdirs;
writes an inference-only Orbax folder, or what diffusers, Black Forest Labs' code or ComfyUI read.
"""

import errno
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from shortcut_jax import cli
from shortcut_jax.cluster.distributed import say, tell
from shortcut_jax.cluster.shared_folder import check_place
from shortcut_jax.conversion.gather import DTYPES, check_format, gather
from shortcut_jax.conversion.write import check_space, files_of, write
from shortcut_jax.core.local_path import download_hint
from shortcut_jax.core.schedules import Spacing, sampling_grid
from shortcut_jax.errors import ConvertedError, UsageError
from shortcut_jax.formats import export
from shortcut_jax.sources.models import (
    bases_of,
    with_strengths,
)
from shortcut_jax.steps.networks import VIEWS
from shortcut_jax.weights.lora_files import kohya_notes

FORMATS = ("orbax", "diffusers", "bfl", "comfy")
USAGE = (
    "usage: python -m shortcut_jax.convert --from=PATH [--from=PATH ...] --to=PATH "
    "[--format=orbax|diffusers|bfl|comfy] [--dtype=float32|bfloat16] [--lora=PATH [--lora_scale=N] ...]"
)


def main(argv: Sequence[str]) -> int:
    """Parses the command line and converts. Returns the exit code."""
    from absl import flags, logging

    logging.set_verbosity(logging.FATAL)  # each of Orbax's threads would log the error that is raised here anyway
    values = cli.new_flags()
    several = flags.DEFINE_multi_string
    several("from", None, "Checkpoint, folder, workdir or LoRA; several make one pipeline.", flag_values=values)
    flags.DEFINE_string("to", None, "File or folder to write.", flag_values=values)
    flags.DEFINE_enum("format", "orbax", FORMATS, "What to write.", flag_values=values)
    flags.DEFINE_enum("view", None, VIEWS, "Weights of a workdir; slow by default.", flag_values=values)
    flags.DEFINE_enum("dtype", None, list(DTYPES), "Cast to; as stored by default.", flag_values=values)
    several("lora", None, "LoRA to merge into the transformer, in float32; several are added up.", flag_values=values)
    flags.DEFINE_multi_float("lora_scale", None, "Strength of each --lora; 1 by default.", flag_values=values)
    flags.DEFINE_string("base", None, "Checkpoint that adapters given by --from belong to.", flag_values=values)
    flags.DEFINE_boolean("merged", False, "Write a workdir's adapters merged into their base.", flag_values=values)
    flags.DEFINE_string("tokenizer", None, "Folder of CLIP's tokenizer.", flag_values=values)
    flags.DEFINE_string("tokenizer_2", None, "Folder of T5's tokenizer.", flag_values=values)
    flags.DEFINE_boolean("overwrite", False, "Replace what is at --to.", flag_values=values)
    options = cli.parse(values, argv, USAGE, required=["from", "to"])
    target = Path(options.to).resolve()
    sources = [Path(p).resolve() for p in getattr(options, "from")]
    others = [*(options.lora or []), *(getattr(options, name) for name in ("base", *export.TOKENIZERS))]
    _check_target(target, sources, [Path(p).resolve() for p in others if p], options.overwrite)
    cli.check_finite("lora_scale", options.lora_scale or [])
    options.loras = with_strengths(options.lora, options.lora_scale)
    check_place(target, "--to", folder=False)
    job = gather(sources, options)
    check_format(job, options.format)
    if job.lora or options.format in ("bfl", "comfy"):
        what = "adapters" if job.lora else f"--format={options.format}"
        cli.note_unused(options, f"{what}, without tokenizers", export.TOKENIZERS)
    if job.models.keys() & {"flux"} and job.sampling.text_states == "trimmed" and options.format != "orbax":
        tell(
            ["the model was trained on trimmed text states, but diffusers and ComfyUI feed it those of the padding too"]
        )
    if job.sampling.spacing.start < 1 and options.format != "orbax":
        tell([start_note(job.sampling.spacing)])
    if job.lora and options.format == "comfy":
        tell(kohya_notes(job.lora[0]))
    check_space(job, target)
    files = files_of(job, options.format)
    if target.is_dir() and (len(files) == 1 or (job.lora and options.format != "orbax")):
        raise UsageError(f"{target} is a folder, but --format={options.format} is one file: give another --to")
    try:
        with tqdm(total=job.nbytes, unit="B", unit_scale=True, dynamic_ncols=True, desc=options.format) as bar:
            write(job, target, options.format, options.overwrite, files, bar.update)
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise ConvertedError(f"no space is left on the disk of {target}; nothing of it was kept") from error
        if isinstance(error, OSError):
            raise ConvertedError(f"{target} cannot be written: {error}") from error
        raise
    say(f"wrote {target}")
    return 0


def start_note(spacing: Spacing) -> str:
    """What somebody who samples elsewhere has to know of a run whose samplers of more than one step begin earlier."""
    times = ", ".join(f"{t:.6g}" for t in np.asarray(sampling_grid(4, 4, 1.0, spacing))[:4])
    scaled = " and to scale all their times so" if spacing.scaled else ""
    return (
        f"the run was trained to begin n steps at t = 1 - {1 - spacing.start:.3g} (1 - 1/n){scaled}: for four steps "
        f"give diffusers sigmas=[{times}], and ComfyUI's SamplerCustomAdvanced the same and 0"
    )


def _check_target(target: Path, sources: Sequence[Path], others: Sequence[Path], overwrite: bool) -> None:
    """Refuses what would be lost, before anything is opened. Paths are resolved: a link may lead to a source."""
    if target.exists() and not overwrite:
        raise UsageError(f"{target} is there already: give another --to, or --overwrite")
    given = (*sources, *others)
    if absent := next((path for path in given if not path.exists()), None):
        raise UsageError(f"{absent} is not found{download_hint(absent)}")
    for path in (*given, *(base.resolve() for place in given for base in bases_of(place))):
        if target == path or target in path.parents or path in target.parents:
            raise UsageError(f"--to={target} and {path}, which is read, overlap: write somewhere else")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # conversion happens on the host, whatever else there is
    cli.run(main)
