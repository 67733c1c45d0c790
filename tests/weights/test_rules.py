import re

import numpy as np
import pytest

from shortcut_jax.errors import ConversionError
from shortcut_jax.weights.rules import Converted, Rule, check, export, linear
from shortcut_jax.weights.transforms import kernel, split_output, vector
from tests.helpers import to_torch

RULES = (
    *linear("first", "first"),
    Rule(("blocks.{i}.q.weight", "blocks.{i}.k.weight"), ("some_blocks/qk/kernel",), kernel(parts=2)),
    Rule(("blocks.{i}.both.weight",), ("some_blocks/left/kernel", "some_blocks/right/kernel"), split_output()),
    Rule(("blocks.{i}.norm.weight",), ("some_blocks/norm/scale",), vector()),
)
SHAPES = {
    "first/kernel": (3, 4),
    "first/bias": (4,),
    "some_blocks/qk/kernel": (2, 4, 2, 2, 3),
    "some_blocks/left/kernel": (2, 4, 5),
    "some_blocks/right/kernel": (2, 4, 2, 1),
    "some_blocks/norm/scale": (2, 4),
}


def _source():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    blocks = [
        {"q.weight": draw(6, 4), "k.weight": draw(6, 4), "both.weight": draw(7, 4), "norm.weight": draw(4)}
        for _ in range(2)
    ]
    named = {f"blocks.{i}.{k}": v for i, block in enumerate(blocks) for k, v in block.items()}
    return {"first.weight": draw(4, 3), "first.bias": draw(4), **named}


class Counting(dict):
    """A source that remembers what was read from it, in order."""

    def __init__(self, values):
        super().__init__(values)
        self.reads = []

    def __getitem__(self, name):
        self.reads.append(name)
        return super().__getitem__(name)


def test_values_go_where_the_transforms_say():
    source = _source()
    result = dict(Converted(source, RULES, SHAPES))
    x = np.random.default_rng(1).standard_normal((5, 4)).astype("f")
    for i in range(2):
        q = np.einsum("bd,dhk->bhk", x, result["some_blocks/qk/kernel"][i, :, 0]).reshape(5, 6)
        np.testing.assert_allclose(q, x @ source[f"blocks.{i}.q.weight"].T, rtol=1e-5)
        left, right = (result[f"some_blocks/{side}/kernel"][i].reshape(4, -1) for side in ("left", "right"))
        np.testing.assert_allclose(
            np.concatenate([x @ left, x @ right], axis=1), x @ source[f"blocks.{i}.both.weight"].T, rtol=1e-5
        )


def test_one_parameter_is_read_at_a_time():
    source = Counting(_source())
    stream = iter(Converted(source, RULES, SHAPES).items())
    source.reads.clear()
    assert next(stream)[0] == "first/kernel"
    assert set(source.reads) == {"first.weight"}
    assert next(stream)[0] == "first/bias" and next(stream)[0] == "some_blocks/qk/kernel"
    assert not any("both" in name for name in source.reads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first.weight": None}, "missing from the checkpoint: first.weight"),
        ({"blocks.1.norm.weight": None, "blocks.1.norms.weight": np.ones(4)}, "(nearest known name for the first: "),
        ({"extra": np.ones(3)}, "in the checkpoint, but not in this model: extra"),
        ({"first.bias": np.ones(5)}, "first.bias of shape (5,) does not fit first/bias of shape (4,)"),
        ({"blocks.1.q.weight": np.ones((6, 5))}, "blocks.1.q.weight, blocks.1.k.weight of shape (6, 5), (6, 4)"),
        ({"blocks.1.both.weight": np.ones((8, 4))}, "blocks.1.both.weight of shape (8, 4) does not fit"),
        # The right number of values in another order would reshape to garbage.
        ({"first.weight": np.ones((3, 4))}, "first.weight of shape (3, 4) does not fit"),
        ({"first.bias": np.ones((2, 2))}, "it should be (4,)"),
        ({"blocks.0.both.weight": np.ones((4, 7))}, "blocks.0.both.weight of shape (4, 7) does not fit"),
    ],
)
def test_what_does_not_fit_is_named_before_a_value_is_read(change, message):
    source = {k: v for k, v in (_source() | change).items() if v is not None}
    with pytest.raises(ConversionError, match=re.escape(message)):
        check({k: v.shape for k, v in source.items()}, RULES, SHAPES)
    with pytest.raises(ConversionError, match=re.escape(message)):
        Converted(source, RULES, SHAPES)


def test_export_reads_one_parameter_at_a_time_where_their_rows_lie_below_each_other():
    source = _source()
    params = Counting(Converted(source, RULES, SHAPES))
    pieces, seen = [], {}
    for piece in export(params, RULES):
        pieces.append(piece)
        seen[piece.name, piece.first_row] = [name for name in params.reads if "left" in name or "right" in name]
    fused = [(p.name, p.first_row, len(p.value)) for p in pieces if "both" in p.name]
    names = [f"blocks.{i}.both.weight" for i in range(2)]
    assert fused == [(name, 0, 5) for name in names] + [(name, 5, 2) for name in names]
    assert seen[names[1], 0][-1] == "some_blocks/left/kernel" and seen[names[0], 5][-1] == "some_blocks/right/kernel"
    for name, value in to_torch(params, RULES).items():
        np.testing.assert_array_equal(value, source[name], err_msg=name)
