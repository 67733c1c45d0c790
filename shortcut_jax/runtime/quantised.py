"""Quantised checkpoints: float8 weights with scales are widened; anything else is refused, for it would be misread.

ComfyUI's files have one scale beside each float8 weight, `scale_weight` (with a marker `scaled_fp8`) or, in newer ones,
`weight_scale`. Those also say the format of each layer as JSON: in a tensor `comfy_quant` of bytes beside it, or in the
header.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from shortcut_jax.runtime.json_objects import parse_json
from shortcut_jax.runtime.safetensors import LazyTensors
from shortcut_jax.weights.params import Params, Spec
from shortcut_jax.weights.rules import ConversionError

SCALES = ("scale_weight", "weight_scale", "scale_input", "input_scale")
"""Last parts of the names of scales beside float8 weights; those of inputs belong to float8 matrix products."""

FORMATS = {
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
"""ComfyUI's names of formats that can be widened."""

METADATA_KEY = "_quantization_metadata"
"""The header entry in which ComfyUI's files say the formats."""

_FORMAT = "comfy_quant"
_HARMLESS = {"format", "full_precision_matrix_mult"}  # the latter: how to multiply, not what the weight is


class Widened(Params):
    """Tensors of a file by other names; float8 ones are widened by their scale as they are read."""

    def __init__(self, tensors: LazyTensors, names: Mapping[str, str]):
        """Takes a file's tensors, and the name in it of each name here."""
        self._tensors, self._names = tensors, names

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader should be told."""
        float8 = [n for n in self._names.values() if _is_float8(self._tensors, n)]
        told = sum(f"{_layer(n)}.{_FORMAT}" in self._tensors for n in float8)
        notes = (f"{len(float8)} float8 tensors are widened to float32",) if float8 else ()
        return (*notes, f"{told} {_FORMAT} entries, which say that these are float8, are left out") if told else notes

    def spec(self, name: str) -> Spec:
        """See `Params`."""
        own = self._names[name]
        spec = self._tensors.spec(own)
        return Spec(np.dtype(np.float32), spec.shape) if _is_float8(self._tensors, own) else spec

    def __getitem__(self, name: str) -> np.ndarray:
        own = self._names[name]
        value = self._tensors[own]
        if not _is_float8(self._tensors, own):
            return value
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
    return name.rsplit(".", 1)[-1] in (*SCALES, _FORMAT, "scaled_fp8")


def check(tensors: LazyTensors) -> None:
    """Refuses quantised weights other than float8 with one scale, or one a row: their values would be wrong.

    Raises:
      ConversionError: another format, a scale without a float8 weight, of another shape, or a weight of whole numbers.
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
        shape, rows = tensors.spec(name).shape, tensors.spec(weight).shape[0]
        if last in SCALES[:2] and shape not in ((), (1,), (rows,), (rows, 1)):
            raise ConversionError(
                f"{name} has shape {shape}, but one scale, or one for each of {rows} rows, is supported"
            )


def _check_format(tensors: LazyTensors, layer: str, told: Mapping[str, Any]) -> None:
    form, weight = told.get("format"), f"{layer}.weight"
    if form not in FORMATS:
        raise ConversionError(
            f"{layer} is quantised to {form}, which is not supported: take the bfloat16 release, or float8_e4m3fn"
        )
    further = sorted(told.keys() - _HARMLESS)
    if further:
        raise ConversionError(f"{layer} is quantised to {form} with {', '.join(further)}, which is not supported")
    if f"{layer}.{_FORMAT}" not in tensors:
        return  # told in the header, where names may lack a prefix
    if weight not in tensors or tensors.spec(weight).dtype != FORMATS[form]:
        raise ConversionError(f"{layer}.{_FORMAT} says {form}, but {weight} is not of that dtype")
    if not _scales_of(tensors, layer):
        raise ConversionError(f"{layer}.{_FORMAT} says {form}, but there is no {layer}.weight_scale")


def _formats(tensors: LazyTensors) -> dict[str, dict[str, Any]]:
    """What a file says of its layers' formats."""
    found: dict[str, dict[str, Any]] = {}
    if METADATA_KEY in tensors.metadata:
        entries = parse_json(tensors.metadata[METADATA_KEY], f"{METADATA_KEY} in the header").get("layers", {})
        found.update({layer: told for layer, told in entries.items() if isinstance(told, dict)})
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
