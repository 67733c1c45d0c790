"""`train --dry_run --explain`: what every collective of the compiled step moves, and what it hides behind."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from shortcut_jax.core.tree import flat_paths
from shortcut_jax.run.assembly import Assembly
from shortcut_jax.runtime.hlo_schedule import Program, Transfer, num_bytes

SMALL = 2**22
"""Bytes below which what is added up is a vector, a sum or a norm: latency, no bandwidth."""

MOVED = {
    "all-gather": "weights",
    "reduce-scatter": "gradients",
    "all-reduce": "gradients",
    "collective-permute": "ring of gradients",  # a reduce-scatter in steps, each beside a part of the matrix product
}
"""What a collective moves where its array has the shape of a layer's kernel."""

VECTORS = "biases, norms, sums and metrics"
"""What small arrays are that no kernel has the shape of."""


class Line(NamedTuple):
    """One line of the explanation, of equal collectives.

    Attributes:
      kind: of collective.
      dtype: of what it moves.
      bytes: of one run.
      axes: mesh axes, joined by `x`.
      what: parameter path, activation, or vectors; `?` where it is not known.
      beside: what is scheduled between its start and its end; `nothing` for a synchronous one.
    """

    kind: str
    dtype: str
    bytes: int
    axes: str
    what: str
    beside: str


class Explanation(NamedTuple):
    """The collectives of a program.

    Attributes:
      lines: how often each runs in a step.
      attention: calls of each attention kernel.
    """

    lines: Counter[Line]
    attention: dict[str, int]

    @property
    def unexplained(self) -> list[Line]:
        """Lines of which it is not known what they move."""
        return [line for line in self.lines if "?" in line.what]

    def moved(self) -> dict[tuple[str, str, str, bool], int]:
        """Bytes a step by kind, dtype, axes, and whether they are hidden behind other work."""
        total: Counter[tuple[str, str, str, bool]] = Counter()
        for line, times in self.lines.items():
            total[line.kind, line.dtype, line.axes, line.beside != "nothing"] += line.bytes * times
        return dict(total)


def explain(assembly: Assembly, program: Program) -> Explanation:
    """Explains the compiled step of a run."""
    mesh = assembly.mesh.shape
    shapes = {path: leaf.shape for path, leaf in flat_paths(assembly.network_shapes).items()}
    shapes |= {path: leaf.shape for path, leaf in flat_paths(assembly.state_shapes.params).items()}
    lines: Counter[Line] = Counter()
    for transfer in program.transfers(mesh):
        dtypes = "+".join(sorted({dtype for dtype, _ in transfer.arrays}))
        what, axes = describe(transfer, shapes, mesh), " x ".join(transfer.axes)
        lines[Line(transfer.kind, dtypes, transfer.bytes, axes, what, _beside(transfer))] += transfer.times
    return Explanation(lines, program.attention_kernels())


def describe(transfer: Transfer, shapes: Mapping[str, Sequence[int]], mesh: Mapping[str, int]) -> str:
    """What a collective moves: `weights single_blocks/mlp_in/kernel`, `activation of ...`, `vectors`, or `?`.

    Args:
      transfer: the collective.
      shapes: of the parameters, by path.
      mesh: sizes of the mesh axes.
    """
    if all(num_bytes(*array) < SMALL for array in transfer.arrays) and transfer.kind == "all-reduce":
        return VECTORS
    parts: dict[str, None] = {}  # in order, each once
    for (dtype, dims), sources in zip(transfer.arrays, _padded(transfer), strict=False):
        layers = list(dict.fromkeys(layer for name in sources if (layer := _layer(name, shapes))))
        if len(dims) == 1 and "tensor" not in transfer.axes and num_bytes(dtype, dims) >= SMALL:
            # XLA joins gradients to be added up in one call.
            parts[f"gradients of {' and '.join(layers)} joined" if layers else "?"] = None
        elif path := _kernel(transfer.kind, math.prod(dims), layers, shapes, mesh):
            parts[f"{MOVED.get(transfer.kind, 'weights')} {path}"] = None
        elif num_bytes(dtype, dims) >= SMALL:
            parts[_activation(layers, sources)] = None
    return ", ".join(parts) or VECTORS


def _padded(transfer: Transfer) -> list[tuple[str, ...]]:
    """The sources of each array; where there are fewer than arrays, all of them for each."""
    if len(transfer.sources) == len(transfer.arrays):
        return list(transfer.sources)
    return [tuple(name for names in transfer.sources for name in names)] * len(transfer.arrays)


def _kernel(
    kind: str, size: int, layers: Sequence[str], shapes: Mapping[str, Sequence[int]], mesh: Mapping[str, int]
) -> str:
    """The first kernel of these layers that such a collective moves `size` values of; empty if there is none."""
    fractions = {1, mesh["tensor"]}
    if kind in ("collective-permute", "all-reduce"):  # a ring moves a shard, and so do its replicas after a scatter
        fractions |= {mesh["fsdp"], mesh["fsdp"] * mesh["tensor"]}
    if kind == "collective-permute":  # both ways round
        fractions |= {mesh["fsdp"] * 2, mesh["fsdp"] * mesh["tensor"] * 2}
    for layer in layers:
        for path in (p for p in shapes if p.rsplit("/", 1)[0] == layer and p.endswith(("kernel", "/a", "/b"))):
            whole = math.prod(shapes[path][1:] if "_blocks/" in path else shapes[path])
            if any(whole == size * fraction for fraction in fractions):
                return path
    return ""


def _activation(layers: Sequence[str], sources: Sequence[str]) -> str:
    """Where an array that is no kernel's was made."""
    module = next((found[1] for name in sources if (found := re.search(r"(\w+_blocks)/", name))), "")
    where = layers[0] if layers else module
    return f"activation of {where}" if where else "?"


def _layer(op_name: str, shapes: Mapping[str, Sequence[int]]) -> str:
    """The layer that an operation belongs to: the longest one whose path is part of its name."""
    layers = {path.rsplit("/", 1)[0] for path in shapes}
    text = re.sub(r"[^\w.]+", "/", f"/{op_name}/")  # also of inputs: state.params['img_in']['kernel']
    return max((layer for layer in layers if f"/{layer}/" in text), key=len, default="")


def _beside(transfer: Transfer) -> str:
    counts = (
        (transfer.matmuls, "matrix product"),
        (transfer.attentions, "attention kernel"),
        (transfer.others, "other kernel"),
    )
    parts = [f"{n} {name}{'s' * (n > 1)}" for n, name in counts if n]
    return ", ".join(parts) or "nothing"


def tell(explanation: Explanation) -> None:
    """Prints a line for each kind of collective, largest first."""
    print("\n  times  kind                dtype      MB  axes           moves (beside what)")
    ordered = sorted(explanation.lines.items(), key=lambda item: -item[0].bytes * item[1])
    for line, times in ordered:
        size = f"{line.bytes / 1e6:8.2f}"
        print(
            f"  {times:5}  {line.kind:<18}  {line.dtype:<7}{size}  {line.axes:<13}  {line.what} (beside {line.beside})"
        )
    print()
