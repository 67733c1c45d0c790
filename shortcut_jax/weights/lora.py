"""LoRA adapters of Flux, by part: how they lie here, and what they add to a kernel.

In PyTorch an adapter adds alpha / r * up @ down to a weight [out, in], with down [r, in] and up [out, r]. Here it adds
alpha / r * a @ b to a kernel [*in, (parts,) *out], with a [*in, (parts,) r] and b [r, (parts,) *out], so that q, k and
v each have factors of their own; block stacks have a leading depth axis. Attention's and the MLP's output kernels of a
single block read one concatenated input in diffusers and so share one b, which lies with the MLP's.

A module that has no adapter, or one of a lower rank than its neighbours in a stack, is filled up with zeros; the record
of ranks tells what was there.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import ml_dtypes
import numpy as np

from shortcut_jax.core.kernel_axes import Axes, kernel_axes
from shortcut_jax.errors import ConversionError
from shortcut_jax.weights import flux_diffusers
from shortcut_jax.weights.finite import check_finite
from shortcut_jax.weights.params import Params, Spec, common_dtype, spec_of

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of the base's parameters, by path."""


class Factors(NamedTuple):
    """The adapter of one PyTorch module.

    Attributes:
      down: [r, in], LoRA's A.
      up: [out, r], LoRA's B.
      alpha: the update is alpha / r * up @ down.
    """

    down: np.ndarray
    up: np.ndarray
    alpha: float

    @property
    def rank(self) -> int:
        """Of the factors: r."""
        return len(self.down)

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / self.rank


Modules = dict[str, Factors]
"""Adapters by the names of diffusers' modules: `transformer_blocks.0.attn.to_q`."""

Record = dict[str, tuple[int, float]]
"""Rank and alpha of each module that has an adapter, by the same names."""


class Unit(NamedTuple):
    """The smallest thing that has an adapter of its own: one module of diffusers, one part of one of our layers.

    Attributes:
      module: its name in diffusers, `{i}` standing for the block.
      targets: our layers it is part of; two where they share a b.
      part: its place among the parts of the layer.
      parts: how many these are.
      reverses: whether the parts of the output lie the other way round in diffusers.
    """

    module: str
    targets: tuple[str, ...]
    part: int
    parts: int
    reverses: bool


def _make_units() -> tuple[Unit, ...]:
    units = []
    for rule in flux_diffusers.RULES:
        if rule.targets[0].endswith("/kernel"):
            targets = tuple(t.removesuffix("/kernel") for t in rule.targets)
            modules = [s.removesuffix(".weight") for s in rule.sources]
            units += [Unit(m, targets, p, len(modules), rule.transform.reverses) for p, m in enumerate(modules)]
    return tuple(units)


UNITS = _make_units()
GROUPS = tuple((targets, tuple(units)) for targets, units in groupby(UNITS, key=lambda u: u.targets))
"""The units of each layer, or of the two layers that share a b."""


def layer(target: str, shapes: Shapes) -> Axes:
    """The axes of a layer's kernel."""
    return kernel_axes(target, shapes[f"{target}/kernel"])


def sizes(unit: Unit, shapes: Shapes) -> tuple[int, int]:
    """The input and output width of a unit's PyTorch module."""
    layers = [layer(t, shapes) for t in unit.targets]
    return sum(math.prod(x.inputs) for x in layers), math.prod(layers[-1].outputs)


def expand(shapes: Shapes) -> Iterator[tuple[str, Unit, int | None]]:
    """Every module of a base that can have an adapter: its name, its unit and its block."""
    for unit in UNITS:
        if f"{unit.targets[0]}/kernel" in shapes:
            depth = layer(unit.targets[0], shapes).depth
            for i in range(depth[0]) if depth else [None]:
                yield unit.module.format(i=i), unit, i


def check(modules: Modules, shapes: Shapes) -> None:
    """Compares adapters with the base they are to be added to.

    Raises:
      ConversionError: a module is not one of the base, or its widths differ.
    """
    known = {name: unit for name, unit, _ in expand(shapes)}
    for name, f in modules.items():
        if name not in known:
            raise ConversionError(f"the adapter of {name} has no layer in this base: the LoRA belongs to another one")
        given, wanted = (f.down.shape[1], f.up.shape[0]), sizes(known[name], shapes)
        if f.up.shape[1] != f.rank:
            raise ConversionError(f"the factors of {name} have shapes {f.down.shape} and {f.up.shape}: ranks differ")
        if given != wanted:
            raise ConversionError(
                f"the adapter of {name} maps {given[0]} channels to {given[1]}, the base's layer {wanted[0]} to "
                f"{wanted[1]}: the LoRA belongs to another base"
            )


def check_values(modules: Modules) -> None:
    """Raises ConversionError where a factor or an alpha is not finite."""
    for name, f in modules.items():
        for half, values in (("A", f.down), ("B", f.up), ("alpha", np.asarray(f.alpha))):
            check_finite(f"{half} of the adapter of {name}", values)


def record_of(modules: Modules) -> Record:
    """Rank and alpha of each module."""
    return {name: (f.rank, f.alpha) for name, f in modules.items()}


def added(adapters: Sequence[Modules]) -> Modules:
    """Several sets of adapters as one that adds all their products: their factors side by side, in float32."""
    if len(adapters) == 1:
        return adapters[0]
    result: Modules = {}
    for name in dict.fromkeys(name for modules in adapters for name in modules):
        found = [modules[name] for modules in adapters if name in modules]
        down = np.concatenate([np.asarray(f.down, np.float32) for f in found])
        up = np.concatenate([np.float32(f.scale) * np.asarray(f.up, np.float32) for f in found], axis=1)
        result[name] = Factors(down, up, float(len(down)))
    return result


def stack(modules: Modules, shapes: Shapes) -> dict[str, np.ndarray]:
    """Adapters as arrays `layer/a` and `layer/b`.

    Raises:
      ConversionError: see `check`.
    """
    check(modules, shapes)
    arrays = {}
    for targets, units in GROUPS:
        found = [(u, i, modules[name]) for name, u, i in expand(shapes) if u in units and name in modules]
        if not found:
            continue
        parts, rank = units[0].parts, max(f.rank for _, _, f in found)
        dtype = common_dtype({x.dtype for _, _, f in found for x in (f.down, f.up)})
        layers = [layer(t, shapes) for t in targets]
        depth, part_axis = layers[0].depth, layers[0].parts
        blocks = math.prod(depth)
        widths = [math.prod(x.inputs) for x in layers]
        downs = [np.zeros((blocks, w, parts, rank), dtype) for w in widths]
        ups = np.zeros((blocks, rank, parts, *layers[-1].outputs), dtype)
        for u, i, f in found:
            rows = np.split(f.down.T, np.cumsum(widths)[:-1])
            for down, row in zip(downs, rows, strict=True):
                down[i or 0, :, u.part, : f.rank] = row
            up = f.up.T.reshape(f.rank, *layers[-1].outputs)
            ups[i or 0, : f.rank, u.part] = up[:, ::-1] if u.reverses else up
        for target, x, down in zip(targets, layers, downs, strict=True):
            arrays[f"{target}/a"] = down.reshape(*depth, *x.inputs, *part_axis, rank)
        arrays[f"{targets[-1]}/b"] = ups.reshape(*depth, rank, *part_axis, *layers[-1].outputs)
    return arrays


def unstack(arrays: Mapping[str, np.ndarray], record: Record, shapes: Shapes) -> Modules:
    """The inverse of `stack`."""
    modules = {}
    for name, u, i in expand(shapes):
        if name not in record:
            continue
        rank, alpha = record[name]
        block = slice(None) if i is None else i
        downs = []
        for target in u.targets:
            inputs = math.prod(layer(target, shapes).inputs)
            downs.append(arrays[f"{target}/a"][block].reshape(inputs, u.parts, -1)[:, u.part, :rank])
        b = arrays[f"{u.targets[-1]}/b"][block]
        up = b.reshape(len(b), u.parts, *layer(u.targets[-1], shapes).outputs)[:rank, u.part]
        up = up[:, ::-1] if u.reverses else up
        modules[name] = Factors(np.concatenate(downs).T, up.reshape(rank, -1).T, alpha)
    return modules


def scales(record: Record, shapes: Shapes) -> dict[str, np.ndarray]:
    """Scales alpha / r by layer, [blocks, parts] less the axes that the layer does not have; 0 without an adapter."""
    result: dict[str, np.ndarray] = {}
    for name, u, i in expand(shapes):
        if name in record:
            rank, alpha = record[name]
            x = layer(u.targets[-1], shapes)
            array = result.setdefault(u.targets[-1], np.zeros((*x.depth, *x.parts), np.float32))
            index = (() if i is None else (i,)) + ((u.part,) if u.parts > 1 else ())
            array[index] = alpha / rank
    return result


class Merged(Params):
    """A base with adapters added to its kernels, one parameter computed as it is read; added in float32."""

    def __init__(self, base: Mapping[str, np.ndarray], modules: Modules, shapes: Shapes):
        """Takes parameters by path. Raises ConversionError where the adapters do not fit (see `check`)."""
        self._base, self._shapes = base, shapes
        self._arrays = stack(modules, shapes)
        self._scales = scales(record_of(modules), shapes)
        self._homes = {t: targets[-1] for targets, _ in GROUPS for t in targets}

    def spec(self, name: str) -> Spec:
        """See `Params`."""
        return spec_of(self._base, name)

    def __getitem__(self, path: str) -> np.ndarray:
        value, target = self._base[path], path.removesuffix("/kernel")
        if not path.endswith("/kernel") or f"{target}/a" not in self._arrays:
            return value
        home, x = self._homes[target], layer(target, self._shapes)
        blocks, parts = math.prod(x.depth), math.prod(x.parts)
        a = self._arrays[f"{target}/a"].astype(np.float32).reshape(blocks, math.prod(x.inputs), parts, -1)
        b = self._arrays[f"{home}/b"].astype(np.float32).reshape(blocks, a.shape[-1], parts, -1)
        scale, largest = self._scales[home].reshape(blocks, parts), float(ml_dtypes.finfo(value.dtype).max)
        # A lazy base reads a fresh array each time, which may be changed.
        result = value if isinstance(self._base, Params) and value.flags.writeable else np.copy(value)
        there, here = (y.reshape(blocks, a.shape[1], parts, -1) for y in (value, result))
        for i in range(blocks):
            for p in range(parts):
                with np.errstate(over="ignore", invalid="ignore"):  # checked here
                    merged = there[i, :, p].astype(np.float32) + scale[i, p] * (a[i, :, p] @ b[i, :, p])
                    if not max(merged.max(), -merged.min()) <= largest:  # nor is nan
                        raise ConversionError(
                            f"with the adapters, {path} has values that are not finite in {value.dtype}: the adapters "
                            f"are too strong (lower their scales), or the base's own values are not finite"
                        )
                here[i, :, p] = merged
        return result

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)
