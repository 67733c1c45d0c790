"""How arrays of PyTorch become arrays of ours, and back: the columns of the tables in `rules`.

PyTorch stores a linear layer as [out, in]; here a kernel is [*in, *out] with parts and heads as axes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shortcut_jax.weights.params import transposed

Arrays = list[np.ndarray]
Shapes = list[tuple[int, ...]]


@dataclass(frozen=True)
class Transform:
    """How source arrays become target arrays, and back.

    Attributes:
      forward: (sources, target shapes) -> targets.
      backward: targets -> sources.
      reverses: whether the parts of the output lie the other way round in the source.
      by_rows: whether the one source is its targets' rows one after another, so that `backward` also takes each target
        alone and gives its rows.
    """

    forward: Callable[[Arrays, Shapes], Arrays]
    backward: Callable[[Arrays], Arrays]
    reverses: bool = False
    by_rows: bool = False


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
        rows = [transposed(t.reshape(len(t), -1)) for t in targets]
        return [np.concatenate(rows) if len(rows) > 1 else rows[0]]

    return Transform(forward, backward, by_rows=True)


def split_vector() -> Transform:
    """One bias [a + b] as two, *a and *b."""

    def forward(sources: Arrays, shapes: Shapes) -> Arrays:
        first = int(np.prod(shapes[0]))
        return [sources[0][:first].reshape(shapes[0]), sources[0][first:].reshape(shapes[1])]

    def backward(targets: Arrays) -> Arrays:
        return [np.concatenate([t.reshape(-1) for t in targets])]

    return Transform(forward, backward, by_rows=True)
