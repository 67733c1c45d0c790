"""The engine of weight conversion: a table of rows (source names, target paths, transform) run in both directions.

PyTorch stores a linear layer as [out, in]; here a kernel is [*in, *out] with parts and heads as axes. A source name
with `{i}` stands for one block each; its targets carry a leading depth axis.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
    """

    forward: Callable[[Arrays, Shapes], Arrays]
    backward: Callable[[Arrays], Arrays]


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
        columns = [w.T for w in sources]
        joined = np.stack(columns, axis=1) if parts > 1 else columns[0]
        return [joined.reshape(shapes[0])]

    def backward(targets: Arrays) -> Arrays:
        rows = int(np.prod(targets[0].shape[:in_dims]))
        flat = targets[0].reshape(rows, parts, -1)
        return [flat[:, p].T for p in range(parts)]

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
    )


def split_input() -> Transform:
    """One weight [out, a + b] as two kernels, [*a, out] and [*b, out]."""

    def forward(sources: Arrays, shapes: Shapes) -> Arrays:
        first = int(np.prod(shapes[0][:-1]))
        columns = sources[0].T
        return [columns[:first].reshape(shapes[0]), columns[first:].reshape(shapes[1])]

    def backward(targets: Arrays) -> Arrays:
        return [np.concatenate([t.reshape(-1, t.shape[-1]) for t in targets]).T]

    return Transform(forward, backward)


def split_output() -> Transform:
    """One weight [a + b, in] as two kernels, [in, *a] and [in, *b]."""

    def forward(sources: Arrays, shapes: Shapes) -> Arrays:
        first = int(np.prod(shapes[0][1:]))
        columns = sources[0].T
        return [columns[:, :first].reshape(shapes[0]), columns[:, first:].reshape(shapes[1])]

    def backward(targets: Arrays) -> Arrays:
        return [np.concatenate([t.reshape(len(t), -1).T for t in targets])]

    return Transform(forward, backward)


def split_vector() -> Transform:
    """One bias [a + b] as two, *a and *b."""

    def forward(sources: Arrays, shapes: Shapes) -> Arrays:
        first = int(np.prod(shapes[0]))
        return [sources[0][:first].reshape(shapes[0]), sources[0][first:].reshape(shapes[1])]

    def backward(targets: Arrays) -> Arrays:
        return [np.concatenate([t.reshape(-1) for t in targets])]

    return Transform(forward, backward)


def _expand(rule: Rule, depths: Mapping[str, int]) -> list[list[str]]:
    """The source names of each block of a rule, or one list for a rule without blocks."""
    if "{i}" not in rule.sources[0]:
        return [list(rule.sources)]
    depth = depths.get(rule.targets[0].split("/")[0], 0)
    return [[name.format(i=i) for name in rule.sources] for i in range(depth)]


def to_flax(
    source: Mapping[str, np.ndarray], rules: Sequence[Rule], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Converts PyTorch arrays by name to parameters by path.

    Args:
      source: arrays by PyTorch name.
      rules: the table.
      shapes: shape of every parameter wanted, by path.

    Raises:
      ConversionError: a source name is missing or left over, a parameter has no row, or sizes disagree.
    """
    depths = {path.split("/")[0]: shape[0] for path, shape in shapes.items() if "_blocks/" in path}
    wanted = [r for r in rules if r.targets[0] in shapes]
    names = [name for r in wanted for block in _expand(r, depths) for name in block]
    _compare("missing from the checkpoint", set(names) - set(source))
    _compare("in the checkpoint, but not in this model", set(source) - set(names))
    _compare("parameters without a row in the table", set(shapes) - {t for r in wanted for t in r.targets})
    result: dict[str, np.ndarray] = {}
    for rule in wanted:
        blocks = "{i}" in rule.sources[0]
        inner = [shapes[t][1:] if blocks else shapes[t] for t in rule.targets]
        try:
            converted = [rule.transform.forward([source[n] for n in block], inner) for block in _expand(rule, depths)]
        except ValueError as error:
            sizes = [tuple(source[n.format(i=0)].shape) for n in rule.sources]
            raise ConversionError(f"{rule.sources[0]} of shape {sizes} does not fit {inner}: {error}") from error
        for k, target in enumerate(rule.targets):
            result[target] = np.stack([c[k] for c in converted]) if blocks else converted[0][k]
    return result


def to_torch(params: Mapping[str, np.ndarray], rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """The inverse of `to_flax`, derived from the same rows.

    Raises:
      ConversionError: a parameter has no row.
    """
    wanted = [r for r in rules if r.targets[0] in params]
    _compare("parameters without a row in the table", set(params) - {t for r in wanted for t in r.targets})
    depths = {path.split("/")[0]: value.shape[0] for path, value in params.items() if "_blocks/" in path}
    result: dict[str, np.ndarray] = {}
    for rule in wanted:
        blocks = "{i}" in rule.sources[0]
        for i, names in enumerate(_expand(rule, depths)):
            arrays = [np.asarray(params[t][i] if blocks else params[t]) for t in rule.targets]
            result |= {n: np.ascontiguousarray(a) for n, a in zip(names, rule.transform.backward(arrays), strict=True)}
    return result


def _compare(what: str, names: set[str]) -> None:
    if names:
        listed = sorted(names)
        more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
        raise ConversionError(f"{what}: {', '.join(listed[:5])}{more}")


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
