"""The engine of weight conversion: a table of rows (source names, target paths, transform) run in both directions.

A source name with `{i}` stands for one block each; its targets carry a leading depth axis.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from shortcut_jax.errors import ConversionError
from shortcut_jax.weights.params import Params, Spec, common_dtype, empty, raw, shapes_of, spec_of, specs_of
from shortcut_jax.weights.transforms import Shapes, Transform, kernel, vector


def refuse_names(what: str, names: Set[str], others: Set[str] = frozenset()) -> None:
    """Lists names that do not fit, with the nearest of `others` for the first one.

    Raises:
      ConversionError: there are such names.
    """
    if not names:
        return
    listed = sorted(names)
    nearest = difflib.get_close_matches(listed[0], sorted(others), n=1)
    hint = f" (nearest known name for the first: {nearest[0]})" if nearest else ""
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    raise ConversionError(f"{what}: {', '.join(listed[:5])}{more}{hint}")


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
    refuse_names("missing from the checkpoint", names - set(source_shapes), set(source_shapes) - names)
    refuse_names("in the checkpoint, but not in this model", set(source_shapes) - names, names)
    for rule in wanted:
        inner, expected = _inner_shapes(rule, shapes), _source_shapes(rule, shapes)
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
        inner = _inner_shapes(rule, self._shapes)
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


def torch_shapes(shapes: Mapping[str, tuple[int, ...]], rules: Sequence[Rule]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint that `export` makes of parameters of these shapes."""
    depths = _depths(shapes)
    result: dict[str, tuple[int, ...]] = {}
    for rule in _wanted(rules, shapes):
        sources = _source_shapes(rule, shapes)
        for names in _expand(rule, depths):
            result.update(zip(names, sources, strict=True))
    return result


def torch_specs(params: Mapping[str, np.ndarray], rules: Sequence[Rule]) -> dict[str, Spec]:
    """Names, dtypes and shapes of the checkpoint that `export` makes, without reading a parameter."""
    specs = specs_of(params)
    shapes = torch_shapes({path: spec.shape for path, spec in specs.items()}, rules)
    depths, dtypes = _depths(shapes_of(params)), {}
    for rule in _wanted(rules, specs):
        dtype = common_dtype({specs[t].dtype for t in rule.targets})
        dtypes.update({name: dtype for block in _expand(rule, depths) for name in block})
    return {name: Spec(dtypes[name], shape) for name, shape in shapes.items()}


class Piece(NamedTuple):
    """Rows of a tensor of a PyTorch checkpoint, mostly all of them."""

    name: str
    first_row: int
    value: np.ndarray


def export(params: Mapping[str, np.ndarray], rules: Sequence[Rule]) -> Iterator[Piece]:
    """The inverse of `Converted`, derived from the same rows: what PyTorch names hold (views where possible).

    Parameters are read one at a time; a tensor that several of them make comes in pieces where its rows are theirs.

    Raises:
      ConversionError: a parameter has no row.
    """
    specs = specs_of(params)
    depths = _depths(shapes_of(params))
    for rule in _wanted(rules, specs):
        dtype = common_dtype({specs[t].dtype for t in rule.targets})
        first = 0
        for together in [[t] for t in rule.targets] if rule.transform.by_rows else [rule.targets]:
            bits = [raw(params[t].astype(dtype, copy=False)) for t in together]
            for i, names in enumerate(_expand(rule, depths)):
                arrays = [t[i] for t in bits] if _has_blocks(rule) else bits
                for name, value in zip(names, rule.transform.backward(arrays), strict=True):
                    yield Piece(name, first, value.view(dtype))
            first += len(value)
            del bits, arrays, value  # before the next ones are read


def _has_blocks(rule: Rule) -> bool:
    return "{i}" in rule.sources[0]


def _block_shape(rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[1:] if _has_blocks(rule) else shape)


def _inner_shapes(rule: Rule, shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    """The shapes of a rule's targets in one block."""
    return [_block_shape(rule, shapes[t]) for t in rule.targets]


def _source_shapes(rule: Rule, shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    """The shapes of a rule's sources in one block."""
    return [x.shape for x in rule.transform.backward([_blank(shape) for shape in _inner_shapes(rule, shapes)])]


def _blank(shape: tuple[int, ...]) -> np.ndarray:
    """An array of any size that takes one byte."""
    return np.broadcast_to(np.zeros((), np.int8), shape)


def _depths(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Blocks of each stack, by its name."""
    return {path.split("/")[0]: shape[0] for path, shape in shapes.items() if "_blocks/" in path}


def _wanted(rules: Sequence[Rule], shapes: Mapping[str, Any]) -> list[Rule]:
    """The rows of parameters that a model has; a parameter without a row is an error."""
    wanted = [r for r in rules if r.targets[0] in shapes]
    refuse_names("parameters without a row in the table", set(shapes) - {t for r in wanted for t in r.targets})
    return wanted


def _expand(rule: Rule, depths: Mapping[str, int]) -> list[list[str]]:
    """The source names of each block of a rule, or one list for a rule without blocks."""
    if not _has_blocks(rule):
        return [list(rule.sources)]
    depth = depths.get(rule.targets[0].split("/")[0], 0)
    return [[name.format(i=i) for name in rule.sources] for i in range(depth)]


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
