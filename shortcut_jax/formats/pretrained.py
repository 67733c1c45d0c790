"""Opening what Flux users own: single files, shards, diffusers folders, whole pipelines; lazily, and named."""

import json
import re
import shlex
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shortcut_jax.errors import ConversionError, SafetensorsError
from shortcut_jax.formats import quantised
from shortcut_jax.formats.detect import Found, identify
from shortcut_jax.formats.json_objects import read_json
from shortcut_jax.formats.quantised import Widened, beside_float8
from shortcut_jax.formats.safetensors import LazyTensors, choose_files, shard_files
from shortcut_jax.weights.rules import refuse_names

TOKENIZER_FOLDERS = ("tokenizer", "tokenizer_2")
PIPELINE_FOLDERS = ("transformer", "vae", "text_encoder", "text_encoder_2")
"""Folders of a diffusers pipeline that hold weights."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt")

RELATIVES = {
    "kontext": "FLUX.1 Kontext",
    "fluxfill": "FLUX.1 Fill",
    "fluxcontrol(?!net)": "FLUX.1 Canny or Depth",
}
"""Relatives of Flux by what the names of their files, folders or pipelines hold; some have its very shapes."""

UNUSED = {
    "position_ids": "a buffer of CLIP that counts its tokens",
    "text_projection.weight": "CLIP's projection, which Flux does not use",
    "logit_scale": "CLIP's temperature, which is not used here; ComfyUI writes one for T5 too",
    "num_batches_tracked": "a counter of batches in training",
}
"""Ends of the names of what is no part of the models but lies beside them, and what it is."""

_EMBEDDING, _TWIN = "shared.weight", "encoder.embed_tokens.weight"  # T5's, under either name or both
_IMAGE_PROJECTION = "visual_projection.weight"


class Pretrained(NamedTuple):
    """One model of a checkpoint.

    Attributes:
      found: what it is.
      tensors: its tensors by the names of its layout, without prefix, read when used.
      notes: what the reader should know about them.
    """

    found: Found
    tensors: Mapping[str, np.ndarray]
    notes: tuple[str, ...]


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
            raise ConversionError(f"{path}/model_index.json names {', '.join(missing)}, which is not found")
        folders = [path / name for name in PIPELINE_FOLDERS if (path / name).is_dir()]
        return [model for folder in folders for model in _open(folder)]
    return _open(path)


def _open(path: Path) -> list[Pretrained]:
    tensors = open_tensors(path)
    quantised.check(tensors)
    names = _table_names(tensors)
    shapes = {name: tensors.spec(own).shape for name, own in names.items()}
    _refuse_relatives(path.name)
    if (path.parent / "model_index.json").is_file():  # one folder of a pipeline
        _refuse_relatives(str(read_json(path.parent / "model_index.json").get("_class_name", "")))
    models: list[Pretrained] = []
    taken: set[str] = set()
    for found in identify(shapes, _hints(path)):
        own = {n.removeprefix(found.prefix): o for n, o in names.items() if n.startswith(found.prefix)}
        quantised.check_model(tensors, own.values())
        part = Widened(tensors, own)
        taken.update(own.values())
        models.append(Pretrained(found, part, part.notes))
    left = {n for n in set(tensors) - taken if not beside_float8(n)}
    reasons = {name: _unused(name, taken) for name in sorted(left)}
    refuse_names("in the checkpoint, but in none of its models", {n for n in left if not reasons[n]}, taken)
    notes = (f"left out: {name} ({reason})" for name, reason in reasons.items())
    models[0] = models[0]._replace(notes=(*models[0].notes, *notes, *_passed_over(path)))
    return models


def _passed_over(path: Path) -> list[str]:
    files, left = choose_files(path)
    used = f"{files[0].name}{f' and {len(files) - 1} more' if len(files) > 1 else ''}"
    return [f"not read: {', '.join(left)}, for {used} in the same folder is the full model"] if left else []


def _unused(name: str, taken: Set[str]) -> str | None:
    """Why a tensor is not needed beside those taken; None if it is not known to be so."""
    if name.endswith(_TWIN) and name.removesuffix(_TWIN) + _EMBEDDING in taken:
        return "T5's embedding, which is there twice"
    return next((reason for end, reason in UNUSED.items() if name.endswith(end)), None)


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


def _table_names(tensors: LazyTensors) -> dict[str, str]:
    """The names that our tables use -> the names in the file, less what is no weight of its own.

    Writers of text encoders differ: T5's embedding is stored once, twice or under its encoder's name, newer libraries
    drop CLIP's `text_model.`, and CLIP's projection and buffers are no part of the tower.
    """
    names = {n: n for n in tensors if not beside_float8(n)}
    for name in list(names):
        if name.endswith(_TWIN):
            own, twin = names.pop(name), name.removesuffix(_TWIN) + _EMBEDDING
            if twin in names and not np.array_equal(tensors[own].view(np.uint8), tensors[twin].view(np.uint8)):
                raise ConversionError(f"{name} and {twin} should be one table, but differ")
            names.setdefault(twin, own)
    sign = "embeddings.token_embedding.weight"
    tower = next((n.removesuffix(sign) for n in names if n.endswith(sign)), None)
    if tower is not None and not tower.endswith("text_model."):
        names = {
            f"{tower}text_model.{n.removeprefix(tower)}" if n.startswith(tower) else n: o for n, o in names.items()
        }
    # A whole CLIP is there to score images, and projects both of its towers.
    pairs = [n.removesuffix(_IMAGE_PROJECTION) for n in names if n.endswith(_IMAGE_PROJECTION)]
    needed = {f"{prefix}text_projection.weight" for prefix in pairs}
    return {n: o for n, o in names.items() if n in needed or not n.endswith(tuple(UNUSED))}


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
        raise SafetensorsError(f"{path} is not found" if not path.exists() else f"{path} is empty")
    if any(f.name.endswith(".safetensors") or ".safetensors.index." in f.name for f in files):
        return
    for file in files:
        if file.suffix == ".gguf":
            raise ConversionError(f"{file} is GGUF, which is quantised and not supported: take a safetensors release")
        if file.suffix in PICKLES:
            target = file.with_suffix(".safetensors").name
            code = (
                f"import torch, safetensors.torch as s; "
                f'w = torch.load({json.dumps(file.name)}, map_location="cpu", weights_only=True); '
                f"s.save_file({{k: v.contiguous().clone() for k, v in w.items()}}, {json.dumps(target)})"
            )
            raise ConversionError(
                f"{file} is a pickle, which could run any code, so it is not opened. If you trust it, in its folder: "
                f"python -c {shlex.quote(code)}"
            )


def _hints(path: Path) -> dict[str, Any]:
    """The config.json beside the weights, if there is one."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    entries = read_json(config) if config.is_file() else {}
    return {name: value for name, value in entries.items() if value is not None}
