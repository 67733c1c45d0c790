import pytest

from shortcut_jax.core.kernel_axes import kernel_axes


@pytest.mark.parametrize(
    ("layer", "shape", "axes"),
    [
        ("img_in", (64, 32), ((), (64,), (), (32,))),
        ("double_blocks/img_attn/qkv", (19, 32, 3, 2, 16), ((19,), (32,), (3,), (2, 16))),
        ("double_blocks/txt_attn_out", (19, 2, 16, 32), ((19,), (2, 16), (), (32,))),
        ("single_blocks/attn_out", (38, 2, 16, 32), ((38,), (2, 16), (), (32,))),
        ("single_blocks/modulation/linear", (38, 32, 3, 32), ((38,), (32,), (), (3, 32))),
    ],
)
def test_axes_are_told_by_the_path(layer, shape, axes):
    assert kernel_axes(layer, shape) == axes
