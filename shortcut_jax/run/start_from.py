"""Given weights: what a run starts from (`--config.init_from=PATH`), and the frozen base that adapters are added to."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax

from shortcut_jax.cluster.distributed import say, tell
from shortcut_jax.core.fingerprint import fingerprint
from shortcut_jax.core.local_path import download_hint, local_path
from shortcut_jax.core.tree import flat_paths
from shortcut_jax.errors import ConfigError, ConversionError
from shortcut_jax.formats.to_devices import place
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.models.init import FRESH_INPUTS, fresh_embeddings
from shortcut_jax.models.lora import adapter_shapes
from shortcut_jax.run.assembly import Assembly
from shortcut_jax.runtime.checkpoint import stored_meta
from shortcut_jax.sources.models import Model, base_of, holds_lora, open_lora, open_models, param_shapes, sampling_of
from shortcut_jax.steps.networks import GUIDANCE_MODES, Frozen
from shortcut_jax.steps.state import TrainState
from shortcut_jax.weights.lora import Modules, record_of, scales, stack
from shortcut_jax.weights.rescale import rescaled
from shortcut_jax.weights.rules import nest

GEOMETRY = (
    *("double_blocks", "single_blocks", "width", "heads", "axes", "channels", "text_width", "pooled_width"),
    *("guidance", "mlp_ratio", "theta"),
)
"""What has to be the same in a checkpoint and in the network that starts from it."""


class Initial(NamedTuple):
    """Opened, compared with the run, and not yet read.

    Attributes:
      model: the whole network, or the frozen base; None for random weights.
      path: where it is.
      adapters: that training starts from.
      teacher: adapters of the teacher.
    """

    model: Model | None = None
    path: Path | None = None
    adapters: Modules | None = None
    teacher: Modules | None = None


def open_initial(assembly: Assembly, base: dict[str, Any] | None = None) -> Initial:
    """What a run starts from or is based on, its headers read and its geometry compared.

    Args:
      assembly: the run.
      base: on resuming, what the checkpoint says of its base (`BaseRecord`); adapters are then not opened.

    Raises:
      ConfigError: it is not found, holds no transformer, is of another geometry, or adapters are for another base,
        other layers or another rank.
      SafetensorsError, ConversionError, ConvertedError: it cannot be read.
    """
    s = assembly.settings
    start = None if s.init_from is None or base is not None else _existing("init_from", s.init_from)
    is_lora = start is not None and holds_lora(start)
    if is_lora and s.train == "all":
        raise ConfigError(
            f"init_from={s.init_from} is a LoRA, but train=all: set train=lora to go on with it, or merge it into its "
            f"base first with python -m shortcut_jax.convert --from=BASE --lora={s.init_from} --to=MERGED"
        )
    name, path = "init_from", start
    if s.base is not None and start is not None and not is_lora:
        raise ConfigError(
            f"init_from={s.init_from} and base={s.base} are two networks, but training starts from its base: give one "
            f"of them (base goes with adapters in init_from, or with a run that is resumed)"
        )
    if s.base is not None:
        name, path = "base", _existing("base", s.base)
    elif base is not None:
        name, path = "base", _existing("base", base["path"], "the base has moved: name its new place with --base")
    elif is_lora and start:
        found = base_of(start)
        if found is None:
            raise ConfigError(f"init_from={s.init_from} is a LoRA that does not know its base: name it with base")
        name, path = "base", _existing("base", found, "name its new place with --base")
    if path is None:
        return Initial()
    model = _open_network(assembly, name, path)
    adapters = _open_adapters(assembly, "init_from", start) if is_lora and start else None
    at = local_path(s.teacher_lora, "teacher_lora") if s.teacher_lora else None
    teacher = _open_adapters(assembly, "teacher_lora", at) if at else None
    return Initial(model, path, adapters, teacher)


def _existing(name: str, path: str, hint: str = "") -> Path:
    found = local_path(path, name)
    if not found.exists():
        raise ConfigError(f"{name}={path} is not found{f': {hint}' if hint else download_hint(found.absolute())}")
    return found


def _open_network(assembly: Assembly, name: str, path: Path) -> Model:
    s, given = assembly.settings, f"{name}={path}"
    models = [m for m in open_models(path, s.init_view) if m.kind == "flux"]
    if not models:
        raise ConfigError(f"{given} holds no Flux transformer")
    (model,) = models
    distilling = GUIDANCE_MODES[s.guidance_mode].distils
    if distilling and model.config.guidance:
        raise ConfigError(
            f"{given} has a guidance embedding already, and guidance_mode={s.guidance_mode} would guide it once more: "
            "set guidance_mode=embedded"
        )
    ignored = ("guidance",) if distilling else ()
    differences = _differences(model.config, assembly.model, ignored)
    if differences:
        raise ConfigError(
            f"{given} is another network than model.preset={s.model.preset}; checkpoint -> config: "
            f"{'; '.join(differences)}"
        )
    if s.data.text_encoder == "stored" and (known := sampling_of(path, [model]).text_states) != s.data.text_states:
        raise ConfigError(
            f"{given} was trained on {known} text states, but data.text_states={s.data.text_states}: prepare the set "
            f"with --text_states={known}{' (trimmed ones are for training from scratch)' if known == 'full' else ''}"
        )
    if model.config.step_size and not assembly.model.step_size:
        raise ConfigError(f"{given} has a step-size embedding: train it with objective=shortcut")
    return model


def _differences(stored: FluxConfig, wanted: FluxConfig, ignored: tuple[str, ...]) -> list[str]:
    old, new = dataclasses.asdict(stored), dataclasses.asdict(wanted)
    names = [name for name in GEOMETRY if name not in ignored]
    return [f"{name}: {old[name]!r} -> {new[name]!r}" for name in names if old[name] != new[name]]


def _open_adapters(assembly: Assembly, name: str, path: Path) -> Modules:
    """Adapters that fit the layers and the rank of the run."""
    s = assembly.settings
    found = _existing(name, str(path))
    try:
        modules, notes = open_lora(found, assembly.model, s.init_view)
    except ConversionError as error:
        raise ConversionError(f"{name}={path}: {error}") from error
    tell(notes)
    ranks = {f.rank for f in modules.values()}
    if ranks != {s.lora.rank}:
        raise ConfigError(
            f"{name}={path} has rank {', '.join(map(str, sorted(ranks)))}, but lora.rank is {s.lora.rank}: set "
            f"lora.rank to the rank of the file"
        )
    shapes = param_shapes("flux", assembly.model)
    held, wanted = set(stack(modules, shapes)), set(adapter_shapes(shapes, s.lora.rank, s.lora.paths))
    if held != wanted:
        layers = lambda paths: ", ".join(sorted({p.rpartition("/")[0] for p in paths})[:4])
        parts = [f"it lacks {layers(wanted - held)}"] if wanted - held else []
        parts += [f"it also has {layers(held - wanted)}"] if held - wanted else []
        raise ConfigError(
            f"{name}={path} adapts other layers than lora.paths={s.lora.paths!r}: {'; '.join(parts)}; set lora.paths "
            f"to a regular expression of the file's layers"
        )
    return modules


class BaseRecord(NamedTuple):
    """What a checkpoint says of the frozen base it does not hold.

    Attributes:
      path: where it was read from.
      hash: `fingerprint` of its values as they are held.
      preset: of its geometry.
      teacher: where the teacher's adapters were read from, if there are any.
      teacher_hash: `fingerprint` of them.
    """

    path: str
    hash: str
    preset: str
    teacher: str | None = None
    teacher_hash: str | None = None


def start(assembly: Assembly, initial: Initial) -> tuple[TrainState, BaseRecord | None]:
    """The state before the first step, from what was opened; no host holds the whole model."""
    if initial.model is None:
        return assembly.init_state(), None
    weights = _load(assembly, initial.model, assembly.network_shapes)
    adapters = _load_adapters(assembly, initial.adapters, "init_from")
    teacher = _load_adapters(assembly, initial.teacher, "teacher_lora")
    if initial.adapters:
        say(f"adapters start from {assembly.settings.init_from}")
    state = assembly.init_state(weights, adapters, teacher)
    return state, _record(assembly, initial, state.frozen)


def freeze(assembly: Assembly, initial: Initial, stored: dict[str, Any] | None) -> tuple[Any, BaseRecord | None]:
    """The frozen part of a state that is resumed.

    Raises:
      ConfigError: the base is not the one that the checkpoint was trained on.
    """
    if initial.model is None:
        return assembly.freeze(), None
    weights = _load(assembly, initial.model, assembly.state_shapes.frozen.base)
    frozen = assembly.freeze(weights, _load_adapters(assembly, initial.teacher, "teacher_lora"))
    record = _record(assembly, initial, frozen)
    check_base(record, stored)
    if record and stored:
        _check_teacher(record, stored)
    return frozen, record


def check_base(record: BaseRecord | None, stored: dict[str, Any] | None) -> None:
    """Raises ConfigError where a base is another one than a checkpoint was trained on."""
    if record and stored and record.hash != stored["hash"]:
        raise ConfigError(
            f"the base {record.path} has content {record.hash}, but this run was trained on {stored['hash']} (then at "
            f"{stored['path']}): the base has changed; name the right one with --base"
        )


def _check_teacher(record: BaseRecord, stored: dict[str, Any]) -> None:
    if record.teacher_hash != stored.get("teacher_hash"):
        raise ConfigError(
            f"teacher_lora={record.teacher} has content {record.teacher_hash}, but this run was trained with "
            f"{stored.get('teacher_hash')} (then at {stored.get('teacher')}): name the right one with teacher_lora"
        )


def _record(assembly: Assembly, initial: Initial, frozen: Frozen) -> BaseRecord | None:
    """What is to be said of the base. Raises ConfigError where adapters were trained on another one."""
    if frozen.base is None:
        return None
    s = assembly.settings
    absolute = lambda path: str(local_path(str(path), "base"))
    record = BaseRecord(absolute(initial.path), fingerprint(frozen.base), s.model.preset)
    if frozen.teacher is not None:
        record = record._replace(teacher=absolute(s.teacher_lora), teacher_hash=fingerprint(frozen.teacher))
    used = {"init_from": s.init_from if initial.adapters else None, "teacher_lora": s.teacher_lora}
    for name, path in used.items():
        meta = stored_meta(local_path(path, name) / "checkpoints") if path else None
        if meta and meta["base"] and meta["base"]["hash"] != record.hash:
            raise ConfigError(
                f"{name}={path} was trained on a base with content {meta['base']['hash']} (then at "
                f"{meta['base']['path']}), but {record.path} has {record.hash}: name the right one with base"
            )
    return record


def load_base(assembly: Assembly, path: str | Path, stored: dict[str, Any]) -> Any:
    """The base of a run that is only sampled, on devices.

    Raises:
      ConfigError: it is not found, of another geometry, or not the one that the run was trained on.
    """
    model = _open_network(assembly, "base", _existing("base", str(path), "name its new place with --base"))
    base = _load(assembly, model, assembly.state_shapes.frozen.base)
    check_base(BaseRecord(str(path), fingerprint(base), assembly.settings.model.preset), stored)
    return base


def _load(assembly: Assembly, model: Model, shapes: Any) -> Any:
    """Weights on the mesh, in the dtypes and shardings of `shapes`."""
    say(f"{'base' if assembly.settings.train == 'lora' else 'starting from'}: {model.origin}")
    tell(model.notes)
    wanted = flat_paths(shapes)
    fresh = {path for path in wanted if path not in model.params and path.startswith(FRESH_INPUTS)}
    placed = place(model.params, nest({k: v for k, v in wanted.items() if k not in fresh}), model.where)
    if not fresh:
        return placed
    names = sorted({path.split("/")[0] for path in fresh})
    say(f"{' and '.join(names)} start from scratch: the checkpoint has no such embedding")
    shardings = nest({k: wanted[k].sharding for k in fresh})
    drawn = jax.jit(lambda: fresh_embeddings(assembly.model, names), out_shardings=shardings)()
    return placed | jax.tree.map(lambda x, w: x.astype(w.dtype), drawn, nest({k: wanted[k] for k in fresh}))


def _load_adapters(assembly: Assembly, modules: Modules | None, name: str) -> Any:
    """Adapters on the mesh, in float32, their own scales traded for the run's."""
    if modules is None:
        return None
    shapes = param_shapes("flux", assembly.model)
    arrays = rescaled(stack(modules, shapes), scales(record_of(modules), shapes), assembly.settings.lora.scale)
    wanted = flat_paths(assembly.state_shapes.params)
    return place(arrays, nest(wanted), f"{name}={getattr(assembly.settings, name)}")
