"""The engine of weight conversion: a table of rows (source names, target paths, transform) run in both directions.

PyTorch stores a linear layer as [out, in]; here a kernel is [*in, *out] with parts and heads as axes. A source name
with `{i}` stands for one block each; its targets carry a leading depth axis.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from shortcut_jax.weights.params import Params, Spec, common_dtype, empty, raw, shapes_of, spec_of, specs_of, transposed

Arrays = list[np.ndarray]
Shapes = list[tuple[int, ...]]


class ConversionError(ValueError):
    """Names or shapes of a checkpoint that do not fit the table; the message names them."""


@dataclass(frozen=True)
class Transform:
    """How source arrays become target arrays, and back.

    Attributes:
      forward: (sources, target shapes) -> targets.
      backward: targets -> sources.
      reverses: whether the parts of the output lie the other way round in the source.
    """

    forward: Callable[[Arrays, Shapes], Arrays]
    backward: Callable[[Arrays], Arrays]
    reverses: bool = False


@dataclass(frozen=True)
class Rule:
    """A row of a table."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    transform: Transform


def linear(source: str, target: str, in_dims: int = 1) -> list[Rule]:
    """The rows of a layer, weight and bias. Several parts one after another in its output become axes by reshaping."""
    return [
        Rule((f"{source}.weight",), (f"{target}/kernel",), kernel(in_dims)),
        Rule((f"{source}.bias",), (f"{target}/bias",), vector()),
    ]


def norm(source: str, target: str) -> list[Rule]:
    """The rows of a norm with scale and bias."""
    return [
        Rule((f"{source}.weight",), (f"{target}/scale",), vector()),
        Rule((f"{source}.bias",), (f"{target}/bias",), vector()),
    ]


def kernel(in_dims: int = 1, parts: int = 1) -> Transform:
    """Weights [out, in], one a part, as one kernel [*in, parts, *out] (no part axis for a single part)."""

    def forward(sources: Arrays, shapes: Shapes) -> Arrays:
        columns = [transposed(w) for w in sources]
        joined = np.stack(columns, axis=1) if parts > 1 else columns[0]
        return [joined.reshape(shapes[0])]

    def backward(targets: Arrays) -> Arrays:
        rows = int(np.prod(targets[0].shape[:in_dims]))
        flat = targets[0].reshape(rows, parts, -1)
        return [transposed(flat[:, p]) for p in range(parts)]

    return Transform(forward, backward)


def vector(parts: int = 1) -> Transform:
    """Biases or scales, one a part, as one array [parts, *out] (no part axis for a single part)."""

    def forward(sources: Arrays, shapes: Shapes) -> Arrays:
        return [np.stack(sources).reshape(shapes[0])]

    def backward(targets: Arrays) -> Arrays:
        return list(targets[0].reshape(parts, -1))

    return Transform(forward, backward)


def array() -> Transform:
    """An array as it is, such as an embedding table."""

    def forward(sources: Arrays, shapes: Shapes) -> Arrays:
        if sources[0].shape != tuple(shapes[0]):
            raise ValueError(f"{sources[0].shape} is not {tuple(shapes[0])}")
        return sources

    return Transform(forward, lambda targets: targets)


def conv() -> Transform:
    """A convolution's weight [out, in, h, w] as a kernel [h, w, in, out]."""

    def forward(sources: Arrays, shapes: Shapes) -> Arrays:
        moved = sources[0].transpose(2, 3, 1, 0)
        if moved.shape != tuple(shapes[0]):
            raise ValueError(f"{moved.shape} is not {tuple(shapes[0])}")
        return [moved]

    return Transform(forward, lambda targets: [targets[0].transpose(3, 2, 0, 1)])


def reordered(inner: Transform, axis: int) -> Transform:
    """`inner`, with the parts along `axis` of its one target reversed: (scale, shift) becomes (shift, scale)."""
    return Transform(
        lambda sources, shapes: [np.flip(inner.forward(sources, shapes)[0], axis)],
        lambda targets: inner.backward([np.flip(targets[0], axis)]),
        reverses=True,
    )


def split_input() -> Transform:
    """One weight [out, a + b] as two kernels, [*a, out] and [*b, out]."""

    def forward(sources: Arrays, shapes: Shapes) -> Arrays:
        first = int(np.prod(shapes[0][:-1]))
        columns = transposed(sources[0])
        return [columns[:first].reshape(shapes[0]), columns[first:].reshape(shapes[1])]

    def backward(targets: Arrays) -> Arrays:
        return [transposed(np.concatenate([t.reshape(-1, t.shape[-1]) for t in targets]))]

    return Transform(forward, backward)


def split_output() -> Transform:
    """One weight [a + b, in] as two kernels, [in, *a] and [in, *b]."""

    def forward(sources: Arrays, shapes: Shapes) -> Arrays:
        first = int(np.prod(shapes[0][1:]))
        columns = transposed(sources[0])
        return [columns[:, :first].reshape(shapes[0]), columns[:, first:].reshape(shapes[1])]

    def backward(targets: Arrays) -> Arrays:
        return [np.concatenate([transposed(t.reshape(len(t), -1)) for t in targets])]

    return Transform(forward, backward)


def split_vector() -> Transform:
    """One bias [a + b] as two, *a and *b."""

    def forward(sources: Arrays, shapes: Shapes) -> Arrays:
        first = int(np.prod(shapes[0]))
        return [sources[0][:first].reshape(shapes[0]), sources[0][first:].reshape(shapes[1])]

    def backward(targets: Arrays) -> Arrays:
        return [np.concatenate([t.reshape(-1) for t in targets])]

    return Transform(forward, backward)


def check(
    source_shapes: Mapping[str, tuple[int, ...]], rules: Sequence[Rule], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Compares names and shapes of a checkpoint with what a model needs, without reading a value.

    Args:
      source_shapes: shapes by PyTorch name.
      rules: the table.
      shapes: shape of every parameter wanted, by path.

    Raises:
      ConversionError: a source name is missing or left over, a parameter has no row, or shapes disagree.
    """
    depths, wanted = _depths(shapes), _wanted(rules, shapes)
    names = {name for r in wanted for block in _expand(r, depths) for name in block}
    _compare("missing from the checkpoint", names - set(source_shapes), set(source_shapes) - names)
    _compare("in the checkpoint, but not in this model", set(source_shapes) - names, names)
    for rule in wanted:
        inner = [_block_shape(rule, shapes[t]) for t in rule.targets]
        expected = [x.shape for x in rule.transform.backward([_blank(shape) for shape in inner])]
        for block in _expand(rule, depths):
            given = [tuple(source_shapes[name]) for name in block]
            if given != expected:
                raise ConversionError(
                    f"{', '.join(block)} of shape {', '.join(map(str, given))} does not fit "
                    f"{', '.join(rule.targets)} of shape {', '.join(map(str, inner))}: "
                    f"it should be {', '.join(map(str, expected))}"
                )


class Converted(Params):
    """A PyTorch checkpoint as parameters by path, in the order of the table.

    Each parameter is made when it is asked for, from one block at a time, so that lazy sources cost the memory of one
    parameter. Blocks of several dtypes become float32.
    """

    def __init__(self, source: Mapping[str, np.ndarray], rules: Sequence[Rule], shapes: Mapping[str, tuple[int, ...]]):
        """Takes arrays by PyTorch name, a table, and the shape of every parameter wanted, by path.

        Raises:
          ConversionError: see `check`, which comes before anything is read.
        """
        check(shapes_of(source), rules, shapes)
        self._source, self._shapes, self._depths = source, shapes, _depths(shapes)
        self._places = {target: (rule, k) for rule in _wanted(rules, shapes) for k, target in enumerate(rule.targets)}

    def spec(self, name: str) -> Spec:
        """See `Params`."""
        rule, _ = self._places[name]
        sources = [s for block in _expand(rule, self._depths) for s in block]
        return Spec(common_dtype({spec_of(self._source, s).dtype for s in sources}), tuple(self._shapes[name]))

    def __getitem__(self, name: str) -> np.ndarray:
        rule, k = self._places[name]
        inner = [_block_shape(rule, self._shapes[t]) for t in rule.targets]
        dtype = self.spec(name).dtype
        value = empty(self._shapes[name], dtype)
        there = raw(value) if _has_blocks(rule) else raw(value)[None]
        for i, block in enumerate(_expand(rule, self._depths)):
            arrays = [raw(self._source[s].astype(dtype, copy=False)) for s in block]
            there[i] = rule.transform.forward(arrays, inner)[k]
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def to_flax(
    source: Mapping[str, np.ndarray], rules: Sequence[Rule], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """All of `Converted` at once."""
    return dict(Converted(source, rules, shapes))


def torch_shapes(shapes: Mapping[str, tuple[int, ...]], rules: Sequence[Rule]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint that `export` makes of parameters of these shapes."""
    return {name: value.shape for name, value in export({path: _blank(shape) for path, shape in shapes.items()}, rules)}


def torch_specs(params: Mapping[str, np.ndarray], rules: Sequence[Rule]) -> dict[str, Spec]:
    """Names, dtypes and shapes of the checkpoint that `export` makes, without reading a parameter."""
    specs = specs_of(params)
    shapes = torch_shapes({path: spec.shape for path, spec in specs.items()}, rules)
    depths, dtypes = _depths(shapes_of(params)), {}
    for rule in _wanted(rules, specs):
        dtype = common_dtype({specs[t].dtype for t in rule.targets})
        dtypes.update({name: dtype for block in _expand(rule, depths) for name in block})
    return {name: Spec(dtypes[name], shape) for name, shape in shapes.items()}


def export(params: Mapping[str, np.ndarray], rules: Sequence[Rule]) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `Converted`, derived from the same rows: PyTorch names and arrays (views where possible).

    Raises:
      ConversionError: a parameter has no row.
    """
    shapes = shapes_of(params)
    depths = _depths(shapes)
    for rule in _wanted(rules, shapes):
        targets = [params[t] for t in rule.targets]
        dtype = common_dtype({t.dtype for t in targets})
        bits = [raw(t.astype(dtype, copy=False)) for t in targets]
        for i, names in enumerate(_expand(rule, depths)):
            arrays = [t[i] for t in bits] if _has_blocks(rule) else bits
            for name, value in zip(names, rule.transform.backward(arrays), strict=True):
                yield name, value.view(dtype)
        del targets, bits, arrays, value  # before the next ones are read


def to_torch(params: Mapping[str, np.ndarray], rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """All of `export` at once, as contiguous arrays."""
    return {name: np.ascontiguousarray(value) for name, value in export(params, rules)}


def _has_blocks(rule: Rule) -> bool:
    return "{i}" in rule.sources[0]


def _block_shape(rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[1:] if _has_blocks(rule) else shape)


def _blank(shape: tuple[int, ...]) -> np.ndarray:
    """An array of any size that takes one byte."""
    return np.broadcast_to(np.zeros((), np.int8), shape)


def _depths(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Blocks of each stack, by its name."""
    return {path.split("/")[0]: shape[0] for path, shape in shapes.items() if "_blocks/" in path}


def _wanted(rules: Sequence[Rule], shapes: Mapping[str, Any]) -> list[Rule]:
    """The rows of parameters that a model has; a parameter without a row is an error."""
    wanted = [r for r in rules if r.targets[0] in shapes]
    _compare("parameters without a row in the table", set(shapes) - {t for r in wanted for t in r.targets})
    return wanted


def _expand(rule: Rule, depths: Mapping[str, int]) -> list[list[str]]:
    """The source names of each block of a rule, or one list for a rule without blocks."""
    if not _has_blocks(rule):
        return [list(rule.sources)]
    depth = depths.get(rule.targets[0].split("/")[0], 0)
    return [[name.format(i=i) for name in rule.sources] for i in range(depth)]


def _compare(what: str, names: Set[str], others: Set[str] = frozenset()) -> None:
    """Raises where `names` are not empty, with the nearest of `others` behind the first one."""
    if not names:
        return
    listed = sorted(names)
    nearest = difflib.get_close_matches(listed[0], sorted(others), n=1)
    hint = f" (nearest known name for the first: {nearest[0]})" if nearest else ""
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    raise ConversionError(f"{what}: {', '.join(listed[:5])}{more}{hint}")


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays by path `a/b/c` as nested dicts."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, leaf = path.split("/")
        node = tree
        for name in folders:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree
