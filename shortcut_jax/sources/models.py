"""Whatever holds weights, opened alike: PyTorch checkpoints, converted folders, training workdirs, LoRA files."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from shortcut_jax.config.checks import from_config
from shortcut_jax.config.derive import model_config, sampling_spacing
from shortcut_jax.config.schema import Settings, build
from shortcut_jax.config.stored import complete
from shortcut_jax.core.local_path import download_hint
from shortcut_jax.core.schedules import ShiftRule
from shortcut_jax.core.tree import flat_paths
from shortcut_jax.errors import ConversionError, ConvertedError, UsageError
from shortcut_jax.formats.detect_encoders import Found, describe
from shortcut_jax.formats.inference_checkpoint import RECORD, OrbaxParams, Sampling, read_record
from shortcut_jax.formats.json_objects import parse_json, read_json
from shortcut_jax.formats.pretrained import open_pretrained, open_tensors
from shortcut_jax.models.clip import ClipPair, ClipText
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.models.inception import SIDE, InceptionV3
from shortcut_jax.models.t5 import T5Encoder
from shortcut_jax.models.vae import Autoencoder
from shortcut_jax.runtime.checkpoint import step_folders, stored_meta
from shortcut_jax.sources.frozen_base import Completed
from shortcut_jax.steps.networks import GUIDANCE_MODES
from shortcut_jax.weights import schedulers
from shortcut_jax.weights.foreign import refuse_adapters
from shortcut_jax.weights.lora import Merged, Modules, added, check_values, expand, unstack
from shortcut_jax.weights.lora import check as check_lora
from shortcut_jax.weights.lora_files import METADATA_KEY, alpha_origin, header_notes, read
from shortcut_jax.weights.lora_names import is_lora
from shortcut_jax.weights.params import Spec, shapes_of, specs_of
from shortcut_jax.weights.rules import Converted

PIPELINE_KINDS = ("flux", "vae", "clip", "t5")
"""What images are made with."""
JUDGES = ("clip_score", "inception")
"""What images are judged with: both towers of CLIP, and the InceptionV3 of FID."""
KINDS = (*PIPELINE_KINDS, *JUDGES)


class Model(NamedTuple):
    """One model of a source.

    Attributes:
      kind: one of `KINDS`.
      config: its geometry.
      params: by path, read when they are used.
      origin: what it is, in words.
      notes: what the reader should know.
      path: the file or folder it was opened from.
    """

    kind: str
    config: Any
    params: Mapping[str, np.ndarray]
    origin: str
    notes: tuple[str, ...] = ()
    path: Path | None = None

    @property
    def where(self) -> str:
        """What to call it in a message about its values."""
        return self.origin if self.path is None else f"{self.kind} of {self.path}"

    @property
    def specs(self) -> dict[str, Spec]:
        """Dtypes and shapes by path."""
        return specs_of(self.params)


@functools.lru_cache(maxsize=64)
def abstract_params(kind: str, config: Any) -> dict[str, Any]:
    """The parameters of a model as abstract arrays, nested; the same ones for the same config."""
    from shortcut_jax.models.init import weight_shapes

    key, tokens = jax.random.key(0), np.zeros((1, 2), np.int32)
    if kind == "flux":
        return weight_shapes(config)
    if kind == "vae":
        side = config.factor
        example: Any = np.zeros((1, side, side, config.channels), np.float32)
        return jax.eval_shape(Autoencoder(config).init, key, example)["params"]
    if kind == "inception":
        image = np.zeros((1, SIDE, SIDE, 3), np.float32)
        return jax.eval_shape(lambda k: InceptionV3(config).init(k, image, classify=True), key)["params"]
    if kind == "clip_score":
        image = np.zeros((1, config.side, config.side, 3), np.float32)
        return jax.eval_shape(ClipPair(config).init, key, image, tokens)["params"]
    module: Any = T5Encoder(config) if kind == "t5" else ClipText(config)
    return jax.eval_shape(module.init, key, tokens)["params"]


def buildable_params(model: Model) -> dict[str, Any]:
    """`abstract_params` of a model whose geometry is that of a record. Raises ConvertedError where it has none."""
    try:
        return abstract_params(model.kind, model.config)
    except Exception as error:  # heads that do not divide a width, and whatever else flax and JAX find
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ConvertedError(f"{model.origin}: no model has this geometry ({reason}): convert it again") from error


def check_geometry(model: Model) -> None:
    """Raises ConvertedError where parameters do not have the names and shapes that the record of a folder says."""
    wanted, found = {k: tuple(v.shape) for k, v in flat_paths(buildable_params(model)).items()}, shapes_of(model.params)
    if found != wanted:
        name = min(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))
        there, needed = (shapes.get(name, "missing") for shapes in (found, wanted))
        raise ConvertedError(f"{model.origin}: {name} is {there}, but by its record {needed}: convert it again")


def param_shapes(kind: str, config: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's parameters, by path."""
    return {path: tuple(leaf.shape) for path, leaf in flat_paths(abstract_params(kind, config)).items()}


def open_models(path: Path, view: str = "slow", base: Path | None = None) -> list[Model]:
    """The models in a PyTorch checkpoint, a converted folder or a training workdir; nothing but headers is read.

    The base of a workdir's adapters is read once, though, to see that it is the one they were trained on.

    Args:
      path: a file, or a folder.
      view: of a workdir: `online`, `fast` or `slow`.
      base: of a workdir whose run trained adapters, which are merged into it; where it was read from by default.

    Raises:
      SafetensorsError, ConversionError, ConvertedError: it is none of these, damaged, or does not fit its table.
    """
    return [model._replace(path=path) for model in _open_models(path, view, base)]


def _open_models(path: Path, view: str, base: Path | None) -> list[Model]:
    if (path / RECORD).is_file():
        stored, _ = read_record(path)
        return [
            Model(m.kind, m.config, OrbaxParams(m.folder), f"{m.kind} of {path} ({m.origin})")
            for m in stored
            if m.kind in KINDS
        ]
    if (path / "checkpoints").is_dir():
        return [_open_workdir(path, view, base)]
    return [_open_found(m.found, m.tensors, m.notes) for m in open_pretrained(path)]


def _open_found(found: Found, tensors: Mapping[str, np.ndarray], notes: tuple[str, ...]) -> Model:
    params = Converted(tensors, found.rules, param_shapes(found.kind, found.config))
    return Model(found.kind, found.config, params, str(found), notes)


class _Workdir(NamedTuple):
    """A training workdir: its settings, what it says of its base, its network, one view of what it trained."""

    settings: Settings
    base: dict[str, Any] | None
    network: FluxConfig
    params: OrbaxParams
    step: int
    notes: tuple[str, ...]


def _read_workdir(workdir: Path, view: str) -> _Workdir:
    folder = workdir / "checkpoints"
    meta = stored_meta(folder)
    steps = sorted(step_folders(folder))
    if meta is None or not steps:
        raise ConvertedError(f"no checkpoint in {folder}: train first, or name another workdir")
    settings = from_config(complete(meta["config"]))
    network = dataclasses.replace(model_config(settings, "cpu", check_backend=False), attention="xla")
    errors = []
    for step in reversed(steps):
        try:
            params = OrbaxParams(folder / str(step), "params" if view == "online" else view)
        except ConvertedError as error:
            errors.append(str(error))
            continue
        skipped = (f"the checkpoint of step {s} is damaged and passed over" for s in steps if s > step)
        return _Workdir(settings, meta["base"], network, params, step, tuple(skipped))
    raise ConvertedError(f"no readable checkpoint in {folder}: {errors[0]}")


def _open_workdir(workdir: Path, view: str, base: Path | None) -> Model:
    run = _read_workdir(workdir, view)
    origin = f"{view} weights of step {run.step} in {workdir}: {_words(run.network)}"
    if run.settings.train != "lora":
        return Model("flux", run.network, run.params, origin, run.notes)
    path = base or Path(str(base_of(workdir)))
    if not path.exists():
        raise ConvertedError(
            f"{workdir} holds adapters, and their base {path} is not found: name its place with --base"
        )
    if path.resolve() == workdir.resolve():
        raise ConvertedError(f"{workdir} cannot be the base of its own adapters: name the one it was trained on")
    given = next((m for m in open_models(path, run.settings.init_view) if m.kind == "flux"), None)
    if given is None:
        raise ConvertedError(f"the base {path} of {workdir} holds no Flux transformer")
    whole = Completed(given.params, param_shapes("flux", run.network), run.network)
    whole.check(str(path), str(workdir), (run.base or {}).get("hash"))
    modules, _ = open_lora(workdir, run.network, view)
    params = Merged(whole, modules, shapes_of(whole))
    return Model("flux", run.network, params, f"{origin}, merged into {given.origin}", (*given.notes, *run.notes))


def network_of(workdir: Path) -> FluxConfig:
    """The geometry of the network that a workdir's run trained."""
    return _read_workdir(workdir, "slow").network


def needs_fresh_embedding(path: Path) -> bool:
    """Whether adapters are those of a run that gave its base a guidance embedding."""
    if not (path / "checkpoints").is_dir():
        return False
    return GUIDANCE_MODES[_read_workdir(path, "slow").settings.guidance_mode].distils


def bases_of(path: Path) -> list[Path]:
    """The base of a workdir's adapters, and its base if that is such a workdir too."""
    found: list[Path] = []
    while (name := base_of(path)) is not None and (path := Path(name)) not in found:
        found.append(path)
    return found


def base_of(path: Path) -> str | None:
    """Where the base of a workdir's adapters was, as its checkpoint says; None where `path` does not say."""
    meta = stored_meta(path / "checkpoints")
    return meta["base"]["path"] if meta and meta["base"] else None


def _words(config: FluxConfig) -> str:
    return describe(Found("flux", "", "", config, ()))


def sampling_of(path: Path, models: list[Model]) -> Sampling:
    """How the pipeline in a source is sampled: as it says, or as FLUX.1 dev (with guidance) or schnell is."""
    if (path / RECORD).is_file():
        return read_record(path)[1]
    guided = next((m.config.guidance for m in models if m.kind == "flux"), True)
    length = 512 if guided else 256
    if meta := stored_meta(path / "checkpoints"):
        settings = build(complete(meta["config"]))
        data, spacing = settings.data, sampling_spacing(settings)
        tokens, states = (data.text_tokens, data.text_states) if data.text_encoder == "stored" else (length, "full")
        return Sampling(ShiftRule(dynamic=guided), tokens, states, spacing)
    schedule = _schedule_of(path)
    if schedule is None:
        return Sampling(ShiftRule(dynamic=guided), length)
    return Sampling(schedule.shift, length, spacing=schedule.spacing)


def scheduler_notes(path: Path) -> tuple[str, ...]:
    """What a reader should know of the scheduler of a source, if it has one."""
    schedule = None if (path / RECORD).is_file() else _schedule_of(path)
    return () if schedule is None else schedule.notes


def _schedule_of(path: Path) -> schedulers.Schedule | None:
    """The scheduler of a diffusers pipeline; diffusers takes the class that its index names."""
    file, index = path / "scheduler" / "scheduler_config.json", path / "model_index.json"
    if not file.is_file():
        return None
    config = read_json(file)
    named = (read_json(index).get("scheduler") if index.is_file() else None) or [None, None]
    for where, name in ((str(file), config.get("_class_name")), (str(index), named[-1])):
        schedulers.check_class(name, config, where)
    return schedulers.read(config, str(file))


def holds_lora(path: Path) -> bool:
    """Whether a source holds adapters."""
    if (path / RECORD).is_file():
        return any(m.kind == "lora" for m in read_record(path)[0])
    if (path / "checkpoints").is_dir():
        meta = stored_meta(path / "checkpoints")
        return meta is not None and complete(meta["config"])["train"] == "lora"
    if (path / "model_index.json").is_file():
        return False
    return is_lora(open_tensors(_lora_file(path)))


PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""What PEFT writes into the folder of an adapter."""


def _lora_file(path: Path) -> Path:
    """The adapter of a PEFT folder; any other path as it is."""
    return path / PEFT_FILE if (path / PEFT_FILE).is_file() else path


def open_lora(path: Path, base: FluxConfig, view: str = "slow") -> tuple[Modules, tuple[str, ...]]:
    """The adapters in a LoRA file, a PEFT or converted folder or a workdir, and what the reader should know.

    Args:
      path: of it.
      base: geometry of the network they are for.
      view: of a workdir: `online`, `fast` or `slow`.

    Raises:
      SafetensorsError, ConversionError, ConvertedError: damaged, of another kind, of another base, or none for Flux.
    """
    shapes, notes = param_shapes("flux", base), tuple[str, ...]()
    if (path / RECORD).is_file():
        modules = _converted_lora(path)
    elif (path / "checkpoints").is_dir():
        modules, notes = _workdir_lora(path, view)
    else:
        modules, notes = _read_lora(path, shapes)
    check_values(modules)
    if not modules:
        raise ConversionError(f"{path} adapts no layer of the transformer{': ' if notes else ''}{'; '.join(notes)}")
    check_lora(modules, shapes)
    return modules, notes


def with_strengths(loras: Sequence[str] | None, scales: Sequence[float] | None) -> list[tuple[str, float]]:
    """Each `--lora` with its `--lora_scale`, 1 by default. Raises UsageError for unequal numbers of them."""
    loras = loras or []
    scales = scales or [1.0] * len(loras)
    if len(scales) != len(loras):
        raise UsageError(f"--lora is given {len(loras)} times, --lora_scale {len(scales)}: give one for each")
    return list(zip(loras, scales, strict=True))


def open_loras(loras: Sequence[tuple[str | Path, float]], base: FluxConfig) -> tuple[Modules, tuple[str, ...]]:
    """The sum of several adapters, each multiplied by a strength of its own, and what the reader should know.

    Args:
      loras: paths, as `open_lora` takes them, and strengths; at least one.
      base: geometry of the network they are for.

    Raises:
      ValueError: a strength that is not finite.
      SafetensorsError, ConversionError, ConvertedError: one is not found; see `open_lora`.
    """
    opened, notes = [], []
    for given, strength in loras:
        path = Path(given).expanduser()
        if not path.exists():
            raise ConvertedError(f"the LoRA {path} is not found{download_hint(path)}")
        if not math.isfinite(strength):
            raise ValueError(f"the strength of {path} is {strength}, but must be finite")
        modules, found = open_lora(path, base)
        opened.append({name: f._replace(alpha=f.alpha * strength) for name, f in modules.items()})
        notes += [f"{path.name}: {note}" if len(loras) > 1 else note for note in found]
    return added(opened), tuple(notes)


def _converted_lora(path: Path) -> Modules:
    stored = next((m for m in read_record(path)[0] if m.kind == "lora"), None)
    if stored is None:
        raise ConversionError(f"{path} holds no LoRA")
    own = param_shapes("flux", stored.config.base)
    return unstack(dict(OrbaxParams(stored.folder)), stored.config.modules, own)


def _read_lora(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Modules, tuple[str, ...]]:
    file = _lora_file(path)
    tensors = open_tensors(file)
    if not is_lora(tensors):
        refuse_adapters(tensors)
        raise ConversionError(f"{path} holds no LoRA: its names have neither lora_A nor lora_down")
    config, where, notes = _peft_config(file, tensors.metadata)
    others = sorted(f.name for f in path.glob("*.safetensors") if f != file) if file != path else []
    notes += tuple(f"{name} is left out: the adapter of a PEFT folder is {PEFT_FILE}" for name in others)
    modules, found = read(tensors, shapes, config, where)
    origin = (alpha_origin(tensors, config, where),) if modules else ()
    return modules, (*found, *header_notes(tensors.metadata), *notes, *origin)


def _peft_config(file: Path, header: Mapping[str, str]) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """PEFT's config of a LoRA file, empty without one, where it is, and what the reader should know."""
    beside = file.parent / PEFT_CONFIG
    if METADATA_KEY in header:
        entries = parse_json(header[METADATA_KEY], f"{METADATA_KEY} in the header of {file}")
        config = {k.removeprefix("transformer."): v for k, v in entries.items()}
        return config, f"{METADATA_KEY} in the file's header", ()
    if file.name == PEFT_FILE and beside.is_file():
        return read_json(beside), PEFT_CONFIG, ()
    if file.is_file() and beside.is_file():
        return {}, "", (f"{PEFT_CONFIG} beside {file.name} is not used: it belongs to {PEFT_FILE}",)
    return {}, "", ()


def _workdir_lora(path: Path, view: str) -> tuple[Modules, tuple[str, ...]]:
    run = _read_workdir(path, view)
    if run.settings.train != "lora":
        raise ConversionError(f"{path} holds no LoRA: its run trained all weights")
    shapes, lora = param_shapes("flux", run.network), run.settings.lora
    record = {
        n: (lora.rank, lora.scale * lora.rank) for n, u, _ in expand(shapes) if f"{u.targets[-1]}/b" in run.params
    }
    return unstack(dict(run.params), record, shapes), run.notes
