"""Writing what `convert` gathered, in whatever format."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_jax.cluster.distributed import say
from shortcut_jax.conversion.gather import Job
from shortcut_jax.errors import ConvertedError
from shortcut_jax.formats import export
from shortcut_jax.formats.inference_checkpoint import (
    LoraInfo,
    Stored,
    complete_or_absent,
    write_params,
    write_record,
)
from shortcut_jax.formats.tokenizers import copy_tokenizer
from shortcut_jax.sources.models import (
    param_shapes,
)
from shortcut_jax.weights.lora import record_of, stack
from shortcut_jax.weights.lora_files import to_kohya, to_peft


def write(
    job: Job, target: Path, form: str, overwrite: bool, files: Mapping[str, list[export.Part]], progress: Any
) -> None:
    """Writes a job.

    Args:
      job: what is written.
      target: the file or folder.
      form: one of the command's formats.
      overwrite: whether what is at `target` is replaced.
      files: see `files_of`.
      progress: takes the bytes that were written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if job.lora and form != "orbax":
        modules, base = job.lora
        tensors, metadata = to_peft(modules) if form == "diffusers" else to_kohya(modules, param_shapes("flux", base))
        export.write_tensors(target, tensors, metadata)
        progress(job.nbytes)
    elif len(files) == 1:
        (parts,) = files.values()
        export.write_file(target, parts, progress)
    else:
        with complete_or_absent(target, overwrite) as folder:
            if form == "orbax":
                _write_orbax(job, folder, progress)
            elif form == "diffusers":
                _write_diffusers(job, folder, progress)
            for name, parts in files.items():
                export.write_file(folder / name, parts, progress)


def check_space(job: Job, target: Path) -> None:
    """Raises ConvertedError where the disk has less room than the job needs."""
    folder = next(p for p in target.parents if p.exists())
    free = shutil.disk_usage(folder).free
    if free < job.nbytes:
        raise ConvertedError(f"{target} needs {job.nbytes / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB free")


def files_of(job: Job, form: str) -> dict[str, list[export.Part]]:
    """What goes into the files of a format that has files and no folders, by their names."""
    models = job.models
    part = lambda m, prefix="": export.Part(m.params, export.rules_for(m.kind, "bfl", m.config), prefix)
    if form == "comfy" and models:
        whole = len(models) > 1 or "flux" in models
        prefix = lambda kind: export.COMFY_PREFIXES[kind] if whole else ""
        return {"model.safetensors": [part(m, prefix(kind)) for kind, m in models.items()]}
    if form != "bfl":
        return {}
    names = {"flux": "flux1.safetensors", "vae": "ae.safetensors"}
    left = [kind for kind in models if kind not in names]
    if left:
        say(f"note: {', '.join(left)} are not part of Black Forest Labs' format and are left out")
    return {names[kind]: [part(m)] for kind, m in models.items() if kind in names}


def _write_orbax(job: Job, folder: Path, progress: export.Progress) -> None:
    stored = []
    if job.lora:
        modules, base = job.lora
        write_params(folder / "lora", _counted(stack(modules, param_shapes("flux", base)), progress))
        stored.append(Stored("lora", LoraInfo(base, record_of(modules)), "LoRA", folder / "lora"))
    for kind, model in job.models.items():
        write_params(folder / kind, _counted(model.params, progress))
        stored.append(Stored(kind, model.config, model.origin, folder / kind))
    _copy_tokenizers(job, folder)
    write_record(folder, stored, job.sampling)


def _write_diffusers(job: Job, folder: Path, progress: export.Progress) -> None:
    if len(job.models) == 1:
        ((kind, model),) = job.models.items()
        export.write_component(folder, kind, model.config, model.params, progress)
        return
    for kind, model in job.models.items():
        component = folder / export.COMPONENTS[kind].folder
        export.write_component(component, kind, model.config, model.params, progress)
    _copy_tokenizers(job, folder)
    export.write_pipeline_index(folder, list(job.models), job.sampling)


def _copy_tokenizers(job: Job, folder: Path) -> None:
    for name, source in job.tokenizers.items():
        copy_tokenizer(source, folder / name)


def _counted(params: Mapping[str, np.ndarray], progress: export.Progress) -> Iterator[tuple[str, np.ndarray]]:
    for name in params:
        value = params[name]
        size = value.nbytes
        yield name, value
        del value  # before the next one is made
        progress(size)
