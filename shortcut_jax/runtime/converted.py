"""Inference-only checkpoints: a folder with one Orbax pytree a model and a record of what they are.

A folder appears under its name only when it is complete.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shortcut_jax.models.clip import ClipConfig
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.models.t5 import T5Config
from shortcut_jax.models.vae import VaeConfig
from shortcut_jax.weights.rules import nest

RECORD = "models.json"
FORMAT_VERSION = 1
CONFIGS: dict[str, type] = {"flux": FluxConfig, "vae": VaeConfig, "t5": T5Config, "clip": ClipConfig}


class ConvertedError(RuntimeError):
    """A converted checkpoint that cannot be read or written; the message names it and the reason."""


class Stored(NamedTuple):
    """One model of a converted checkpoint.

    Attributes:
      kind: `flux`, `vae`, `t5` or `clip`.
      config: its geometry.
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
    shutil.rmtree(partial, ignore_errors=True)  # What an earlier attempt that was killed left.
    partial.mkdir(parents=True)
    try:
        yield partial
        if target.is_dir():
            shutil.rmtree(target)
        elif target.exists():
            target.unlink()
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_params(folder: Path, params: Iterator[tuple[str, np.ndarray]]) -> None:
    """Writes a model's parameters as an Orbax pytree, one at a time: the memory of the largest one is enough."""
    import orbax.checkpoint.experimental.v1 as ocp

    for path, value in params:
        ocp.partial.save(folder, nest({path: value}))
    ocp.partial.finalize(folder)


def write_record(folder: Path, models: list[Stored]) -> None:
    """Writes what the models of a folder are."""
    entries = {m.kind: {"config": _geometry(m.config), "origin": m.origin} for m in models}
    (folder / RECORD).write_text(json.dumps({"format_version": FORMAT_VERSION, "models": entries}, indent=2) + "\n")


def read_record(folder: Path) -> list[Stored]:
    """The models of a converted checkpoint.

    Raises:
      ConvertedError: it is not one, or of a later format.
    """
    path = folder / RECORD
    try:
        record = json.loads(path.read_text())
        if record["format_version"] != FORMAT_VERSION:
            raise ConvertedError(f"{path} has format version {record['format_version']}, not {FORMAT_VERSION}")
        return [
            Stored(kind, _config(kind, entry["config"]), entry["origin"], folder / kind)
            for kind, entry in record["models"].items()
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConvertedError(f"{path} cannot be read: {error}") from error


def read_params(stored: Stored, shapes: Any) -> Any:
    """A model's parameters, each device reading its own shards.

    Args:
      stored: the model.
      shapes: the parameters as `jax.ShapeDtypeStruct` with their shardings, nested.

    Raises:
      ConvertedError: the files are damaged or do not fit.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    try:
        return ocp.load(stored.folder, shapes)
    except Exception as error:  # Orbax and TensorStore each raise their own kinds.
        reason = str(error).strip().splitlines()[0][:200]
        raise ConvertedError(f"the {stored.kind} model in {stored.folder} cannot be read: {reason}") from error


def _geometry(config: Any) -> dict[str, Any]:
    """The fields of a config that are numbers or lists of them: not how, but what is computed."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {k: v for k, v in values.items() if isinstance(v, bool | int | float | tuple) or v is None}


def _config(kind: str, values: dict[str, Any]) -> Any:
    return CONFIGS[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
