"""Opening what Flux users own: single files, shards, diffusers folders, whole pipelines; lazily, and named."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from shortcut_jax.runtime.identify import Found, identify
from shortcut_jax.runtime.safetensors import LazyTensors, SafetensorsError, shard_files
from shortcut_jax.weights.params import Params, Spec
from shortcut_jax.weights.rules import ConversionError

TOKENIZER_FOLDERS = ("tokenizer", "tokenizer_2")
PIPELINE_FOLDERS = ("transformer", "vae", "text_encoder", "text_encoder_2")
"""Folders of a diffusers pipeline that hold weights."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SCALES = ("scale_weight", "weight_scale", "scale_input", "input_scale")
"""Last parts of the names of scales beside float8 weights; those of inputs belong to float8 matrix products."""

RELATIVES = {
    "kontext": "FLUX.1 Kontext",
    "fluxfill": "FLUX.1 Fill",
    "fluxcontrol(?!net)": "FLUX.1 Canny or Depth",
}
"""Relatives of Flux by what the names of their files, folders or pipelines hold; some have its very shapes."""

_NO_WEIGHTS = ("position_ids", "text_projection.weight", "logit_scale")
"""Ends of names beside a CLIP text tower that are not used by it."""

_FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))


class Pretrained(NamedTuple):
    """One model of a checkpoint.

    Attributes:
      found: what it is.
      tensors: its tensors by the names of its layout, without prefix, read when used.
      notes: what the reader should be told about them.
    """

    found: Found
    tensors: Mapping[str, np.ndarray]
    notes: tuple[str, ...]


class _Part(Params):
    """One model's tensors by the names of its table; float8 ones are widened by their scale as they are read."""

    def __init__(self, tensors: LazyTensors, names: Mapping[str, str]):
        """Takes a file's tensors, and the name in it of each name here."""
        self._tensors, self._names = tensors, names

    @property
    def float8(self) -> int:
        """How many of them are float8."""
        return sum(self._tensors.spec(n).dtype in _FLOAT8 for n in self._names.values())

    def spec(self, name: str) -> Spec:
        """See `Params`."""
        spec = self._tensors.spec(self._names[name])
        return Spec(np.dtype(np.float32), spec.shape) if spec.dtype in _FLOAT8 else spec

    def __getitem__(self, name: str) -> np.ndarray:
        own = self._names[name]
        value = self._tensors[own]
        if value.dtype not in _FLOAT8:
            return value
        layer = own.rsplit(".", 1)[0]
        scales = [self._tensors[f"{layer}.{s}"] for s in SCALES[:2] if f"{layer}.{s}" in self._tensors]
        wide = value.astype(np.float32)
        if not scales or not name.endswith(".weight"):
            return wide
        scale = scales[0].astype(np.float32)  # one for the tensor, or one a row
        return wide * (scale.reshape(-1, *(1,) * (wide.ndim - 1)) if scale.size > 1 else scale.reshape(()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_pretrained(path: Path) -> list[Pretrained]:
    """The models in a file, an index of shards, a folder of shards or a pipeline folder.

    Raises:
      SafetensorsError: a file is missing, damaged or of a format that is refused.
      ConversionError: it is none of the supported models.
    """
    if path.is_dir() and (path / "model_index.json").is_file():
        index = read_json(path / "model_index.json")
        _refuse_relatives(str(index.get("_class_name", "")))
        missing = [
            name
            for name in (*PIPELINE_FOLDERS, *TOKENIZER_FOLDERS)
            if any(index.get(name) or ()) and not (path / name).is_dir()
        ]
        if missing:
            raise ConversionError(f"{path}/model_index.json names {', '.join(missing)}, which is not there")
        folders = [path / name for name in PIPELINE_FOLDERS if (path / name).is_dir()]
        return [model for folder in folders for model in _open(folder)]
    return _open(path)


def _open(path: Path) -> list[Pretrained]:
    tensors = open_tensors(path)
    names = _table_names(tensors)
    shapes = {name: tensors.spec(own).shape for name, own in names.items()}
    _refuse_relatives(path.name)
    if (path.parent / "model_index.json").is_file():  # one folder of a pipeline
        _refuse_relatives(str(read_json(path.parent / "model_index.json").get("_class_name", "")))
    _check_scales(tensors)
    models: list[Pretrained] = []
    taken: set[str] = set()
    for found in identify(shapes, _hints(path)):
        own = {n.removeprefix(found.prefix): o for n, o in names.items() if n.startswith(found.prefix)}
        part = _Part(tensors, own)
        taken.update(own.values())
        notes = (f"{part.float8} float8 tensors are widened to float32",) if part.float8 else ()
        models.append(Pretrained(found, part, notes))
    left = sorted(n for n in set(tensors) - taken if not _beside_float8(n))
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        models[0] = models[0]._replace(
            notes=(*models[0].notes, f"not part of these models and left out: {', '.join(left[:5])}{more}")
        )
    return models


def open_tensors(path: Path) -> LazyTensors:
    """The tensors of a file, an index of shards or a folder of shards.

    Raises:
      SafetensorsError: a file is missing or damaged.
      ConversionError: a format that is refused.
    """
    _refuse(path)
    tensors = LazyTensors(shard_files(path))
    if any("bitsandbytes" in name for name in tensors):
        raise ConversionError(
            f"{path} is quantised to NF4, which is not supported: take the bfloat16 or float8 release"
        )
    return tensors


def _beside_float8(name: str) -> bool:
    """Whether a tensor belongs to the float8 weight beside it."""
    return name.rsplit(".", 1)[-1] in (*SCALES, "scaled_fp8")


def _table_names(tensors: LazyTensors) -> dict[str, str]:
    """The names that our tables use -> the names in the file, less what is no weight of its own.

    Writers of text encoders differ: T5's embedding is stored once, twice or under its encoder's name, newer libraries
    drop CLIP's `text_model.`, and CLIP's projection and buffers are no part of the tower.
    """
    names = {n: n for n in tensors if not _beside_float8(n)}
    for name in list(names):
        stem, embedding = name.removesuffix("encoder.embed_tokens.weight"), "shared.weight"
        if stem != name:
            own, twin = names.pop(name), stem + embedding
            if twin in names and not np.array_equal(tensors[own].view(np.uint8), tensors[twin].view(np.uint8)):
                raise ConversionError(f"{name} and {twin} should be one table, but differ")
            names.setdefault(twin, own)
    sign = "embeddings.token_embedding.weight"
    tower = next((n.removesuffix(sign) for n in names if n.endswith(sign)), None)
    if tower is not None and not tower.endswith("text_model."):
        names = {
            f"{tower}text_model.{n.removeprefix(tower)}" if n.startswith(tower) else n: o for n, o in names.items()
        }
    return {n: o for n, o in names.items() if not n.endswith(_NO_WEIGHTS)}


def _check_scales(tensors: LazyTensors) -> None:
    """Refuses quantised weights other than float8 with one scale, or one a row: their values would be wrong.

    Raises:
      ConversionError: a scale without a float8 weight, of another shape, or a weight of whole numbers.
    """
    for name in tensors:
        layer, _, last = name.rpartition(".")
        weight = f"{layer}.weight"
        if last == "weight" and tensors.spec(name).dtype.kind in "iub":
            raise ConversionError(
                f"{name} is {tensors.spec(name).dtype}: quantised otherwise than float8, not supported"
            )
        if last not in SCALES:
            continue
        if weight not in tensors or tensors.spec(weight).dtype not in _FLOAT8:
            raise ConversionError(f"{name} is a scale, but {weight} is not a float8 weight beside it")
        shape, rows = tensors.spec(name).shape, tensors.spec(weight).shape[0]
        if last in SCALES[:2] and shape not in ((), (1,), (rows,), (rows, 1)):
            raise ConversionError(
                f"{name} has shape {shape}, but one scale, or one for each of {rows} rows, is supported"
            )


def _refuse_relatives(name: str) -> None:
    """Names what has Flux's shapes but is another model: Kontext reads a second image's tokens.

    Raises:
      ConversionError: `name`, of a file or of a pipeline's class, is that of a relative.
    """
    for sign, relative in RELATIVES.items():
        if re.search(sign, name.lower()):
            raise ConversionError(f"{name} is {relative}, which is not supported: use FLUX.1 dev or schnell")


def _refuse(path: Path) -> None:
    """Names files that are never read: pickles can run code, and GGUF is quantised."""
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    if not files:
        raise SafetensorsError(f"{path} is not there" if not path.exists() else f"{path} is empty")
    if any(f.name.endswith((".safetensors", ".safetensors.index.json")) for f in files):
        return
    for file in files:
        if file.suffix == ".gguf":
            raise ConversionError(f"{file} is GGUF, which is quantised and not supported: take a safetensors release")
        if file.suffix in PICKLES:
            target = file.with_suffix(".safetensors").name
            raise ConversionError(
                f"{file} is a pickle, which could run any code, so it is not opened. If you trust it, in its folder: "
                f"""python -c "import torch, safetensors.torch as s; """
                f"""s.save_file(torch.load('{file.name}', weights_only=True), '{target}')\" """
                f"(where tensors share memory, save clones of them)"
            )


def _hints(path: Path) -> dict[str, Any]:
    """The config.json beside the weights, if there is one."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    entries = read_json(config) if config.is_file() else {}
    return {name: value for name, value in entries.items() if value is not None}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises ConversionError where it is none."""
    return parse_json(file.read_text(), str(file))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """A JSON object. Raises ConversionError, which names `where`, if the text is none."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConversionError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{where} is not a JSON object")
    return value
