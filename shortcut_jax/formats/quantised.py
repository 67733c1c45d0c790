"""Quantised checkpoints: float8 weights with scales are widened; anything else is refused, for it would be misread.

ComfyUI's files have one scale beside each float8 weight, `scale_weight` (with a marker `scaled_fp8`) or, in newer ones,
`weight_scale`. Those also say the format of each layer as JSON: in a tensor `comfy_quant` of bytes beside it, or in the
header.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from shortcut_jax.errors import ConversionError
from shortcut_jax.formats.json_objects import parse_json
from shortcut_jax.formats.safetensors import LazyTensors
from shortcut_jax.weights.finite import check_finite
from shortcut_jax.weights.params import Params, Spec

SCALES = ("scale_weight", "weight_scale", "scale_input", "input_scale")
"""Last parts of the names of scales beside float8 weights; those of inputs belong to float8 matrix products."""

FORMATS = {
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
"""ComfyUI's names of formats that can be widened."""

METADATA_KEY = "_quantization_metadata"
"""The header entry in which ComfyUI's files say the formats."""

_FORMAT, _MARKER = "comfy_quant", "scaled_fp8"
_HARMLESS = {"format", "full_precision_matrix_mult"}  # the latter: how to multiply, not what the weight is


class Widened(Params):
    """Tensors of a file by other names, as they are read: float8 ones widened by their scale, float64 ones rounded."""

    def __init__(self, tensors: LazyTensors, names: Mapping[str, str]):
        """Takes a file's tensors, and the name in it of each name here."""
        self._tensors, self._names = tensors, names

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader should know."""
        float8 = [n for n in self._names.values() if _is_float8(self._tensors, n)]
        double = sum(self._tensors.spec(n).dtype == np.float64 for n in self._names.values())
        told = sum(f"{_layer(n)}.{_FORMAT}" in self._tensors for n in float8)
        lines = (
            (len(float8), "float8 tensors are widened to float32"),
            (told, f"{_FORMAT} entries, which say that these are float8, are left out"),
            (double, "float64 tensors are rounded to float32"),
        )
        return tuple(f"{count} {line}" for count, line in lines if count)

    def spec(self, name: str) -> Spec:
        """See `Params`."""
        own = self._names[name]
        spec = self._tensors.spec(own)
        wide = _is_float8(self._tensors, own) or spec.dtype == np.float64
        return Spec(np.dtype(np.float32), spec.shape) if wide else spec

    def __getitem__(self, name: str) -> np.ndarray:
        """See `Params`. Raises ConversionError where values are not finite, as stored, rounded or scaled."""
        with np.errstate(over="ignore", invalid="ignore"):  # told by name
            return check_finite(self._names[name], self._widened(name))

    def _widened(self, name: str) -> np.ndarray:
        own = self._names[name]
        value = self._tensors[own]
        if not _is_float8(self._tensors, own):
            return value.astype(np.float32) if value.dtype == np.float64 else value
        scales = [self._tensors[s] for s in _scales_of(self._tensors, _layer(own))]
        wide = value.astype(np.float32)
        if not scales or not name.endswith(".weight"):
            return wide
        scale = scales[0].astype(np.float32)  # one for the tensor, or one a row
        return wide * (scale.reshape(-1, *(1,) * (wide.ndim - 1)) if scale.size > 1 else scale.reshape(()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def beside_float8(name: str) -> bool:
    """Whether a tensor belongs to the float8 weight beside it."""
    return name.rsplit(".", 1)[-1] in (*SCALES, _FORMAT, _MARKER)


def check(tensors: LazyTensors) -> None:
    """Refuses quantised weights other than float8 with one scale, or one a row: their values would be wrong.

    Raises:
      ConversionError: another format, a scale without a float8 weight or of another shape, two scales of one weight, or
        a weight of whole numbers.
    """
    for layer, told in _formats(tensors).items():
        _check_format(tensors, layer, told)
    for name in tensors:
        layer, last = _layer(name), name.rsplit(".", 1)[-1]
        weight = f"{layer}.weight"
        if last == "weight" and tensors.spec(name).dtype.kind in "iub":
            raise ConversionError(
                f"{name} is {tensors.spec(name).dtype}: quantised otherwise than float8, not supported"
            )
        if last not in SCALES:
            continue
        if not _is_float8(tensors, weight):
            raise ConversionError(f"{name} is a scale, but {weight} is not a float8 weight beside it")
        shape, whole = tensors.spec(name).shape, tensors.spec(weight).shape
        if not whole:
            raise ConversionError(f"{name} is a scale, but {weight} is a single float8 value")
        if len(_scales_of(tensors, layer)) > 1:
            raise ConversionError(f"{weight} has two scales, {' and '.join(_scales_of(tensors, layer))}")
        rows = whole[0]
        if last in SCALES[:2] and shape not in ((), (1,), (rows,), (rows, 1)):
            raise ConversionError(
                f"{name} has shape {shape}, but one scale, or one for each of {rows} rows, is supported"
            )


def check_model(tensors: LazyTensors, names: Collection[str]) -> None:
    """Refuses a model whose float8 weights have lost a scale, and whole numbers among its parameters.

    Files hold several models, and not all of them need be scaled: one is if any of its weights has a scale, or where a
    marker `scaled_fp8` stands before its names. Without any, float8 is what it says: a cast.

    Args:
      tensors: of the whole file.
      names: of the tensors of one model.

    Raises:
      ConversionError: the message names the tensor.
    """
    marks = [n.removesuffix(_MARKER) for n in tensors if n.endswith(_MARKER)]
    float8 = [n for n in names if n.endswith(".weight") and _is_float8(tensors, n)]
    marked = any(n.startswith(mark) for mark in marks for n in names)
    if marked or any(_scales_of(tensors, _layer(n)) for n in float8):
        for name in float8:
            if len(tensors.spec(name).shape) == 2 and not _scales_of(tensors, _layer(name)):
                raise ConversionError(
                    f"{name} is float8 without a scale, but other weights of its model have one, or {_MARKER} says so: "
                    f"a scale was lost"
                )
    for name in names:
        if tensors.spec(name).dtype.kind in "iub":
            raise ConversionError(f"{name} is {tensors.spec(name).dtype}: no parameter of a model is a whole number")


def _check_format(tensors: LazyTensors, layer: str, told: Mapping[str, Any]) -> None:
    form = told.get("format")
    if form not in FORMATS:
        raise ConversionError(
            f"{layer} is quantised to {form}, which is not supported: take the bfloat16 release, or float8_e4m3fn"
        )
    further = sorted(told.keys() - _HARMLESS)
    if further:
        raise ConversionError(f"{layer} is quantised to {form} with {', '.join(further)}, which is not supported")
    there = f"{layer}.{_FORMAT}" in tensors
    source, weight = (f"{layer}.{_FORMAT}" if there else METADATA_KEY), f"{layer}.weight"
    if not there and weight not in tensors:  # in the header names may lack a prefix
        weight = next((n for n in tensors if n.endswith(f".{weight}")), weight)
    if weight not in tensors or tensors.spec(weight).dtype != FORMATS[form]:
        raise ConversionError(f"{source} says {form}, but {weight} is not of that dtype")
    if not _scales_of(tensors, _layer(weight)):
        raise ConversionError(f"{source} says {form}, but there is no {_layer(weight)}.weight_scale")


def _formats(tensors: LazyTensors) -> dict[str, dict[str, Any]]:
    """What a file says of its layers' formats."""
    found: dict[str, dict[str, Any]] = {}
    if METADATA_KEY in tensors.metadata:
        where = f"{METADATA_KEY} in the header"
        entries = parse_json(tensors.metadata[METADATA_KEY], where).get("layers", {})
        if not isinstance(entries, dict) or not all(isinstance(told, dict) for told in entries.values()):
            raise ConversionError(f"layers of {where} are not JSON objects by layer")
        found.update(entries)
    for name in tensors:
        if name.endswith(f".{_FORMAT}"):
            found[_layer(name)] = parse_json(tensors[name].tobytes().decode(errors="replace"), name)
    return found


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _is_float8(tensors: LazyTensors, name: str) -> bool:
    return name in tensors and tensors.spec(name).dtype in FORMATS.values()


def _scales_of(tensors: LazyTensors, layer: str) -> list[str]:
    """The names of the scales of a layer's weight."""
    return [f"{layer}.{s}" for s in SCALES[:2] if f"{layer}.{s}" in tensors]
