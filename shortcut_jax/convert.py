"""Weights in and out: `python -m shortcut_jax.convert --from=flux1-dev.safetensors --to=flux1-dev [--format=orbax]`.

Reads PyTorch checkpoints (Black Forest Labs, ComfyUI, diffusers), LoRA files, converted folders and training workdirs;
writes an inference-only Orbax folder, or what diffusers, Black Forest Labs' code or ComfyUI read.
"""

import errno
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from tqdm import tqdm

from shortcut_jax import cli
from shortcut_jax.cluster.distributed import say, tell
from shortcut_jax.cluster.shared_folder import check_place
from shortcut_jax.core.schedules import start_of
from shortcut_jax.errors import ConversionError, ConvertedError, UsageError
from shortcut_jax.formats import export
from shortcut_jax.formats.inference_checkpoint import (
    RECORD,
    LoraInfo,
    Sampling,
    Stored,
    complete_or_absent,
    read_record,
    write_params,
    write_record,
)
from shortcut_jax.formats.tokenizers import CLIP, T5, Tokenizer, check_vocab, copy_tokenizer
from shortcut_jax.local_path import download_hint
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.models.presets import preset
from shortcut_jax.sources.models import (
    JUDGES,
    Model,
    bases_of,
    check_geometry,
    holds_lora,
    needs_fresh_embedding,
    network_of,
    open_lora,
    open_loras,
    open_models,
    param_shapes,
    sampling_of,
    scheduler_notes,
    with_strengths,
)
from shortcut_jax.steps.networks import VIEWS
from shortcut_jax.weights.finite import Finite
from shortcut_jax.weights.lora import Merged, Modules, check_values, record_of, stack
from shortcut_jax.weights.lora_files import kohya_notes, to_kohya, to_peft
from shortcut_jax.weights.params import Cast, shapes_of

FORMATS = ("orbax", "diffusers", "bfl", "comfy")
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
USAGE = (
    "usage: python -m shortcut_jax.convert --from=PATH [--from=PATH ...] --to=PATH "
    "[--format=orbax|diffusers|bfl|comfy] [--dtype=float32|bfloat16] [--lora=PATH [--lora_scale=N] ...]"
)


@dataclass(frozen=True)
class Job:
    """What is to be written.

    Attributes:
      models: by kind; empty where adapters alone are converted.
      sampling: how their pipeline is sampled.
      lora: adapters to be converted, and the geometry of their base.
      tokenizers: source folders by their name in a pipeline.
    """

    models: dict[str, Model]
    sampling: Sampling
    lora: tuple[Modules, FluxConfig] | None
    tokenizers: dict[str, Path]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        if self.lora:
            return sum(f.down.nbytes + f.up.nbytes for f in self.lora[0].values())
        return sum(spec.nbytes for m in self.models.values() for spec in m.specs.values())


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
    job = _gather(sources, options)
    _check_format(job, options.format)
    if job.lora or options.format in ("bfl", "comfy"):
        what = "adapters" if job.lora else f"--format={options.format}"
        cli.note_unused(options, f"{what}, without tokenizers", export.TOKENIZERS)
    if job.models.keys() & {"flux"} and job.sampling.text_states == "trimmed" and options.format != "orbax":
        tell(
            ["the model was trained on trimmed text states, but diffusers and ComfyUI feed it those of the padding too"]
        )
    if job.sampling.spacing.start < 1 and options.format != "orbax":
        tell([start_note(job.sampling.spacing.start)])
    if job.lora and options.format == "comfy":
        tell(kohya_notes(job.lora[0]))
    _check_space(job, target)
    files = _files(job, options.format)
    if target.is_dir() and (len(files) == 1 or (job.lora and options.format != "orbax")):
        raise UsageError(f"{target} is a folder, but --format={options.format} is one file: give another --to")
    try:
        with tqdm(total=job.nbytes, unit="B", unit_scale=True, dynamic_ncols=True, desc=options.format) as bar:
            _write(job, target, options.format, options.overwrite, files, bar.update)
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise ConvertedError(f"no space is left on the disk of {target}; nothing of it was kept") from error
        if isinstance(error, OSError):
            raise ConvertedError(f"{target} cannot be written: {error}") from error
        raise
    say(f"wrote {target}")
    return 0


def start_note(start: float) -> str:
    """What somebody who samples elsewhere has to know of a run whose samplers of more than one step begin earlier."""
    return (
        f"the run was trained to begin n steps at t = 1 - {1 - start:.3g} (1 - 1/n): for four steps give diffusers "
        f"sigmas=[{start_of(4, start):.6g}, 0.75, 0.5, 0.25], and ComfyUI's SamplerCustomAdvanced the same and 0"
    )


def _gather(sources: Sequence[Path], options: Any) -> Job:
    """Opens everything and tells what was found."""
    adapters = [] if options.merged else [s for s in sources if holds_lora(s)]
    if options.view and not any((s / "checkpoints").is_dir() for s in sources):
        raise UsageError("--view chooses among the weights of a training workdir, but no --from is one")
    if adapters:
        return _gather_lora(sources, adapters, options)
    if options.base and not options.merged:
        raise UsageError("--base goes with a LoRA given by --from; to merge one use --lora")
    _check_merged(sources, options)
    folders = _tokenizers(sources, options)
    writes = options.format in ("orbax", "diffusers")
    # Read, for copies are not.
    tokenizers = {name: Tokenizer(folder, name) for name, folder in folders.items()} if writes else {}
    models: dict[str, Model] = {}
    sampling: Sampling | None = None
    for source in sources:
        found = open_models(source, options.view or "slow", Path(options.base) if options.base else None)
        for model in found:
            if model.kind in models:
                raise UsageError(f"two of the sources hold a {model.kind} model: {models[model.kind].origin}; {source}")
            models[model.kind] = model
            if (source / RECORD).is_file():
                check_geometry(model)
            _tell(model)
        if sampling is None or any(m.kind == "flux" for m in found):
            sampling = sampling_of(source, found)
            tell(scheduler_notes(source))
    models = {kind: _changed(model, options) for kind, model in models.items()}
    if options.lora and "flux" not in models:
        raise UsageError("--lora is merged into a Flux transformer, but no --from holds one")
    for name, kind in ((CLIP, "clip"), (T5, "t5")):
        if name in tokenizers and kind in models:
            check_vocab(folders[name], tokenizers[name], models[kind].config.vocab)
    assert sampling is not None
    return Job(models, sampling, None, folders)


def _check_merged(sources: Sequence[Path], options: Any) -> None:
    """Merging on request is for workdirs; files are merged into a base by --lora."""
    if options.merged and not (len(sources) == 1 and (sources[0] / "checkpoints").is_dir() and holds_lora(sources[0])):
        raise UsageError("--merged goes with one --from, the workdir of a run that trained adapters")


def _gather_lora(sources: Sequence[Path], adapters: Sequence[Path], options: Any) -> Job:
    if len(sources) > 1 or options.lora:
        raise UsageError(f"{adapters[0]} is a LoRA: convert it alone, or merge it into a base with --lora")
    (source,) = sources
    if options.base:
        bases = [m.config for m in open_models(Path(options.base)) if m.kind == "flux"]
        if not bases:
            raise UsageError(f"--base={options.base} holds no Flux transformer")
        base = bases[0]
    elif (source / RECORD).is_file():
        base = next(m.config.base for m in read_record(source)[0] if m.kind == "lora")
    elif (source / "checkpoints").is_dir():
        base = network_of(source)
    else:
        base = preset("flux-dev")
    try:
        modules, notes = open_lora(source, base, options.view or "slow")
    except ConversionError as error:
        hint = "" if options.base else " (taken for a LoRA of FLUX.1; name another base with --base)"
        raise ConversionError(f"{error}{hint}") from error
    if options.format != "orbax" and needs_fresh_embedding(source):
        raise UsageError(
            f"{source} was trained with a guidance embedding that its base has not, so its adapters alone are of no "
            f"use elsewhere: write the merged weights, with --merged"
        )
    ranks = sorted({f.rank for f in modules.values()})
    say(f"found: LoRA of {len(modules)} modules, rank {', '.join(map(str, ranks))}")
    tell(notes)
    if options.dtype:
        cast = lambda x: x.astype(DTYPES[options.dtype])
        modules = {k: f._replace(down=cast(f.down), up=cast(f.up)) for k, f in modules.items()}
        check_values(modules)
    return Job({}, Sampling(spacing=sampling_of(source, []).spacing), (modules, base), {})


def _tell(model: Model) -> None:
    dtypes = sorted({str(spec.dtype) for spec in model.specs.values()})
    size = sum(spec.nbytes for spec in model.specs.values()) / 1e9
    say(f"found: {model.origin}; {', '.join(dtypes)}, {size:.2f} GB")
    tell(model.notes)


def _changed(model: Model, options: Any) -> Model:
    """The model with the LoRA merged and in the dtype that is asked for."""
    params: Mapping[str, np.ndarray] = model.params
    if options.loras and model.kind == "flux":
        modules, notes = open_loras(options.loras, model.config)
        params = Merged(params, modules, shapes_of(params))
        what = "a LoRA" if len(options.loras) == 1 else f"the sum of {len(options.loras)} LoRAs"
        scaled = " + ".join(f"{scale:g} x {Path(path).name}" for path, scale in options.loras)
        say(f"merging {what} of {len(modules)} modules: {scaled}")
        tell(notes)
    before = None if params is model.params else model.params
    if options.dtype:
        before, params = params, Cast(params, DTYPES[options.dtype])
    return model._replace(params=Finite(params, before))


def _tokenizers(sources: Sequence[Path], options: Any) -> dict[str, Path]:
    found = {}
    for name in export.TOKENIZERS:
        given = getattr(options, name)
        beside = [s / name for s in sources if (s / name).is_dir()]
        # A whole CLIP is released with its tokenizer in the same folder.
        beside += [s for s in sources if name == CLIP and (s / "merges.txt").is_file()]
        if given or beside:
            found[name] = Path(given) if given else beside[0]
    return found


def _check_target(target: Path, sources: Sequence[Path], others: Sequence[Path], overwrite: bool) -> None:
    """Refuses what would be lost, before anything is opened. Paths are resolved: a link may lead to a source."""
    if target.exists() and not overwrite:
        raise UsageError(f"{target} is there already: give another --to, or --overwrite")
    given = (*sources, *others)
    if absent := next((path for path in given if not path.exists()), None):
        raise UsageError(f"{absent} is not there{download_hint(absent)}")
    for path in (*given, *(base.resolve() for place in given for base in bases_of(place))):
        if target == path or target in path.parents or path in target.parents:
            raise UsageError(f"--to={target} and {path}, which is read, overlap: write somewhere else")


def _check_format(job: Job, form: str) -> None:
    judges = [kind for kind in job.models if kind in JUDGES]
    if judges and form != "orbax":
        raise UsageError(f"{', '.join(judges)} judges pictures and is no part of a pipeline: use --format=orbax")
    if job.lora and form == "bfl":
        raise UsageError("a LoRA is written as --format=diffusers (PEFT's names), comfy (kohya's names) or orbax")
    network = job.models.get("flux")
    if network and network.config.step_size and form != "orbax":
        raise UsageError(
            "this model was trained with objective=shortcut and has a step-size embedding, which Flux has not: "
            "only --format=orbax can hold it"
        )
    if form == "bfl" and not {"flux", "vae"} & job.models.keys() and not job.lora:
        raise UsageError("Black Forest Labs' format is that of the transformer and the autoencoder; use diffusers")


def _check_space(job: Job, target: Path) -> None:
    folder = next(p for p in target.parents if p.exists())
    free = shutil.disk_usage(folder).free
    if free < job.nbytes:
        raise ConvertedError(f"{target} needs {job.nbytes / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB free")


def _counted(params: Mapping[str, np.ndarray], progress: export.Progress) -> Iterator[tuple[str, np.ndarray]]:
    for name in params:
        value = params[name]
        size = value.nbytes
        yield name, value
        del value  # before the next one is made
        progress(size)


def _write(
    job: Job, target: Path, form: str, overwrite: bool, files: Mapping[str, list[export.Part]], progress: Any
) -> None:
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


def _files(job: Job, form: str) -> dict[str, list[export.Part]]:
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


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # conversion happens on the host, whatever else there is
    cli.run(main)
