"""Inference-only checkpoints: a folder with one Orbax pytree a model and a record of what they are.

A folder appears under its name only when it is complete.
"""

import ctypes
import dataclasses
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from shortcut_jax.core.schedules import ShiftRule, Spacing
from shortcut_jax.core.tree import flat_paths
from shortcut_jax.errors import ConversionError, ConvertedError
from shortcut_jax.formats.json_objects import build, read_json
from shortcut_jax.formats.safetensors import remove
from shortcut_jax.models.clip import ClipConfig, ClipPairConfig
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.models.inception import InceptionConfig
from shortcut_jax.models.t5 import T5Config
from shortcut_jax.models.vae import VaeConfig
from shortcut_jax.weights.lora import Record
from shortcut_jax.weights.params import Params, Spec
from shortcut_jax.weights.rules import nest

RECORD = "models.json"
FORMAT_VERSION = 1
_BATCH_BYTES = 2**27  # a save of Orbax has a cost of its own
_CHUNK_BYTES = 2**26
_GROUP_BYTES = 2**24  # so has a load
_MOST_TEXT_TOKENS, _MOST_RANK = 4096, 10**5
_AGAIN = "it was edited or damaged; convert again"
CONFIGS: dict[str, type] = {
    "flux": FluxConfig,
    "vae": VaeConfig,
    "t5": T5Config,
    "clip": ClipConfig,
    "clip_score": ClipPairConfig,
    "inception": InceptionConfig,
}


@dataclasses.dataclass(frozen=True)
class LoraInfo:
    """What adapters are.

    Attributes:
      base: the geometry of the network they belong to.
      modules: rank and alpha of each module.
    """

    base: FluxConfig
    modules: Record


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a pipeline is sampled.

    Attributes:
      shift: of the timesteps.
      text_tokens: the length that prompts are padded to for T5.
      text_states: `full`, T5's states of all tokens, or `trimmed`, with zeros behind those of the prompt.
      spacing: of the times between.
    """

    shift: ShiftRule = dataclasses.field(default_factory=ShiftRule)
    text_tokens: int = 512
    text_states: str = "full"
    spacing: Spacing = dataclasses.field(default_factory=Spacing)


class Stored(NamedTuple):
    """One model of a converted checkpoint.

    Attributes:
      kind: `flux`, `vae`, `t5`, `clip`, `clip_score`, `inception` or `lora`.
      config: its geometry; `LoraInfo` for adapters.
      origin: what it was made from.
      folder: the Orbax pytree.
    """

    kind: str
    config: Any
    origin: str
    folder: Path


@contextmanager
def complete_or_absent(target: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to fill, which takes the name `target` at the end and is removed where something fails.

    Raises:
      ConvertedError: `target` is there and not to be overwritten.
    """
    if target.exists() and not overwrite:
        raise ConvertedError(f"{target} is there already: give another --to, or --overwrite")
    partial = target.with_name(f".{target.name}.partial")
    old = target.with_name(f".{target.name}.old")
    remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        if target.exists():  # Set aside first, so that there is no moment without either.
            remove(old)
            target.rename(old)
        partial.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        _remove_while_written(partial)
        raise
    remove(old)


def _remove_while_written(folder: Path, seconds: float = 10.0) -> None:
    """Removes a folder into which threads of an interrupted save may still write for a moment."""
    end = time.monotonic() + seconds
    remove(folder)
    time.sleep(0.2)
    while folder.exists() and time.monotonic() < end:
        remove(folder)
        time.sleep(0.2)


def write_params(folder: Path, params: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes a model's parameters as an Orbax pytree, a few at a time: the largest one sets the memory.

    Orbax copies numpy arrays before it writes them, but not arrays of JAX on the host; and it writes in chunks, so that
    a device can later read its shard alone. Each chunk is a file: its one-database format (OCDBT) would hold the whole
    of a tensor a second time before it writes.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    host = jax.local_devices(backend="cpu")[0]
    waiting: dict[str, jax.Array] = {}

    def save() -> None:
        with context:
            ocp.partial.save(folder, nest(waiting))
        waiting.clear()
        _give_back()

    for path, value in params:
        if waiting and value.nbytes + sum(v.nbytes for v in waiting.values()) > _BATCH_BYTES:
            save()
        waiting[path] = jax.device_put(value, host, may_alias=True)
        del value  # lives on in `waiting` only
    save()
    ocp.partial.finalize(folder)


def _give_back() -> None:
    """Returns freed memory to the system: glibc keeps the buffers of compression, as much as a whole tensor."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class OrbaxParams(Params):
    """The parameters in an Orbax pytree by path: one at a time as numpy arrays, or all at once on devices.

    Small ones are read together with their neighbours and kept until they are asked for: a load of Orbax takes as long
    for kilobytes as for megabytes.
    """

    def __init__(self, folder: Path, item: str | None = None):
        """Reads what is stored; `item` names a pytree of a composite checkpoint.

        Raises:
          ConvertedError: it cannot be read.
        """
        import orbax.checkpoint.experimental.v1 as ocp

        self._folder, self._item = folder, item
        with self._reading():
            tree = ocp.checkpointables_metadata(folder).metadata[item] if item else ocp.metadata(folder).metadata
            self._specs = {k: Spec(np.dtype(v.dtype), tuple(v.shape)) for k, v in _flatten(tree)}
        self._groups = {name: group for group in self._grouped() for name in group}
        self._waiting: dict[str, np.ndarray] = {}

    def _grouped(self) -> Iterator[list[str]]:
        """The names in their order, in groups of at most `_GROUP_BYTES` or of one."""
        group, size = list[str](), 0
        for name, spec in self._specs.items():
            num_bytes = math.prod(spec.shape) * spec.dtype.itemsize
            if group and size + num_bytes > _GROUP_BYTES:
                yield group
                group, size = [], 0
            group, size = [*group, name], size + num_bytes
        if group:
            yield group

    def spec(self, name: str) -> Spec:
        """See `Params`."""
        return self._specs[name]

    def __getitem__(self, name: str) -> np.ndarray:
        value = self._waiting.pop(name, None)
        if value is None:
            group = {k: np.empty(self._specs[k].shape, self._specs[k].dtype) for k in self._groups[name]}
            read = {k: np.asarray(v) for k, v in flat_paths(self._load(nest(group))).items()}
            value, self._waiting = read.pop(name), read
        return value

    def place(self, shapes: Any) -> Any:
        """All parameters as nested dicts of arrays on devices, each device reading its own shards.

        Args:
          shapes: the parameters as `jax.ShapeDtypeStruct` with their shardings, nested.

        Raises:
          ConvertedError: the files are damaged or do not fit.
        """
        return self._load(shapes)

    def _load(self, abstract: Any) -> Any:
        import orbax.checkpoint.experimental.v1 as ocp

        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with self._reading(), context:
            if self._item:
                return ocp.load(self._folder, abstract, checkpointable_name=self._item)
            return ocp.load(self._folder, abstract)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore each raise their own kinds.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            name = f"{self._folder}/{self._item}" if self._item else self._folder
            raise ConvertedError(f"{name} cannot be read: {reason}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def write_record(folder: Path, models: list[Stored], sampling: Sampling) -> None:
    """Writes what the models of a folder are, and how they are sampled."""
    entries = {m.kind: {"config": _geometry(m.config), "origin": m.origin} for m in models}
    record = {"format_version": FORMAT_VERSION, "models": entries, "sampling": dataclasses.asdict(sampling)}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def read_record(folder: Path) -> tuple[list[Stored], Sampling]:
    """The models of a converted checkpoint, and how they are sampled.

    Raises:
      ConvertedError: it is not one, or of a later format.
    """
    path = folder / RECORD
    try:
        record = read_json(path)
        if record["format_version"] != FORMAT_VERSION:
            found = str(record["format_version"])[:40]
            raise ConvertedError(f"{path} has format version {found}, not {FORMAT_VERSION}")
        models = [_stored(kind, entry, folder) for kind, entry in _object(record, "models").items()]
        return models, _sampling(_object(record, "sampling"))
    except KeyError as error:
        raise ConvertedError(f"{path} cannot be read: it lacks {error}; {_AGAIN}") from error
    except ValueError as error:
        raise ConvertedError(f"{path} cannot be read: {error}; {_AGAIN}") from error


def _object(record: dict[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(record[name], dict):
        raise ConversionError(f"{name} is not a JSON object")
    value: dict[str, Any] = record[name]
    return value


def _stored(kind: str, entry: Any, folder: Path) -> Stored:
    if kind not in (*CONFIGS, "lora"):
        raise ConversionError(f"it holds a model of the unknown kind {kind[:40]!r}")
    if not isinstance(entry, dict) or not isinstance(entry["origin"], str):
        raise ConversionError(f"the entry of {kind} is not an object that says its origin")
    return Stored(kind, _config(kind, entry["config"]), entry["origin"], folder / kind)


def _sampling(told: dict[str, Any]) -> Sampling:
    """Records written before they could differ say neither text states nor spacing."""
    states, tokens = told.get("text_states", "full"), told["text_tokens"]
    if states not in ("full", "trimmed"):
        raise ConversionError(f"text_states is {str(states)[:40]!r}, but must be full or trimmed")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or not 1 <= tokens <= _MOST_TEXT_TOKENS:
        raise ConversionError(f"text_tokens is {str(tokens)[:40]}, but must be 1 to {_MOST_TEXT_TOKENS}")
    shift = build(ShiftRule, told["shift"], "shift", least=0)
    return Sampling(shift, tokens, states, build(Spacing, told.get("spacing", {}), "spacing"))


def _geometry(config: Any) -> dict[str, Any]:
    """The fields of a config that are numbers or lists of them: not how, but what is computed."""
    if isinstance(config, LoraInfo):
        return {"base": _geometry(config.base), "modules": config.modules}
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {k: v for k, v in values.items() if isinstance(v, bool | int | float | tuple) or v is None}


def _config(kind: str, values: Any) -> Any:
    if kind != "lora":
        config = build(CONFIGS[kind], values, f"the config of {kind}")
        if texts := [name for name, value in values.items() if isinstance(value, str)]:
            raise ConversionError(f"the config of {kind} says {', '.join(texts)}, which is no geometry")
        return config
    if not isinstance(values, dict) or not isinstance(values["modules"], dict):
        raise ConversionError("the config of lora has no modules")
    modules: Record = {}
    for name, entry in values["modules"].items():
        rank, alpha = entry if isinstance(entry, list) and len(entry) == 2 else (0, 0.0)
        whole = isinstance(rank, int) and not isinstance(rank, bool) and 1 <= rank <= _MOST_RANK
        if not whole or isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e30:
            raise ConversionError(f"rank and alpha of {name[:200]} are {str(entry)[:40]}, which cannot be")
        modules[name] = (rank, float(alpha))
    return LoraInfo(_config("flux", values["base"]), modules)
