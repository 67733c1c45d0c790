"""What `convert` is to write: sources opened, LoRAs merged, dtypes changed, and what does not go together refused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from shortcut_jax.cluster.distributed import say, tell
from shortcut_jax.errors import ConversionError, UsageError
from shortcut_jax.formats import export
from shortcut_jax.formats.inference_checkpoint import (
    RECORD,
    Sampling,
    read_record,
)
from shortcut_jax.formats.tokenizers import CLIP, T5, Tokenizer, check_vocab
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.models.presets import preset
from shortcut_jax.sources.models import (
    JUDGES,
    Model,
    check_geometry,
    holds_lora,
    needs_fresh_embedding,
    network_of,
    open_lora,
    open_loras,
    open_models,
    sampling_of,
    scheduler_notes,
)
from shortcut_jax.weights.finite import Finite
from shortcut_jax.weights.lora import Merged, Modules, check_values
from shortcut_jax.weights.params import Cast, shapes_of

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


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


def gather(sources: Sequence[Path], options: Any) -> Job:
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
            f"{source} was trained with a guidance embedding that its base lacks, so its adapters alone are of no "
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


def check_format(job: Job, form: str) -> None:
    """Raises UsageError for what a format cannot hold."""
    judges = [kind for kind in job.models if kind in JUDGES]
    if judges and form != "orbax":
        raise UsageError(f"{', '.join(judges)} judges images and is no part of a pipeline: use --format=orbax")
    if job.lora and form == "bfl":
        raise UsageError("a LoRA is written as --format=diffusers (PEFT's names), comfy (kohya's names) or orbax")
    network = job.models.get("flux")
    if network and network.config.step_size and form != "orbax":
        raise UsageError(
            "this model was trained with objective=shortcut and has a step-size embedding, which Flux lacks: "
            "only --format=orbax can hold it"
        )
    if form == "bfl" and not {"flux", "vae"} & job.models.keys() and not job.lora:
        raise UsageError("Black Forest Labs' format is that of the transformer and the autoencoder; use diffusers")
