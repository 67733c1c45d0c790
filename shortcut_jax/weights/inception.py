"""The table of the InceptionV3 of FID: `pt_inception-2015-12-05` of pytorch-fid, in torchvision's names.

Each convolution has the four vectors of its batch norm beside it. They are kept, not folded into the kernel, so that
there and back is the identity.
"""

from shortcut_jax.weights.rules import Rule, linear
from shortcut_jax.weights.transforms import conv, vector

_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")

_A = ("1x1", "5x5_1", "5x5_2", "3x3dbl_1", "3x3dbl_2", "3x3dbl_3", "_pool")
_B = ("3x3", "3x3dbl_1", "3x3dbl_2", "3x3dbl_3")
_C = ("1x1", "7x7_1", "7x7_2", "7x7_3", *(f"7x7dbl_{i}" for i in range(1, 6)), "_pool")
_D = ("3x3_1", "3x3_2", "7x7x3_1", "7x7x3_2", "7x7x3_3", "7x7x3_4")
_E = ("1x1", "3x3_1", "3x3_2a", "3x3_2b", "3x3dbl_1", "3x3dbl_2", "3x3dbl_3a", "3x3dbl_3b", "_pool")
_BLOCKS = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), _A),
    "Mixed_6a": _B,
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), _C),
    "Mixed_7a": _D,
    **dict.fromkeys(("Mixed_7b", "Mixed_7c"), _E),
}
_VECTORS = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "variance"}


def _conv_norm(source: str) -> list[Rule]:
    target = source.replace(".", "/").lower()
    vectors = [Rule((f"{source}.bn.{theirs}",), (f"{target}/{ours}",), vector()) for theirs, ours in _VECTORS.items()]
    return [Rule((f"{source}.conv.weight",), (f"{target}/kernel",), conv()), *vectors]


_CONVOLUTIONS = (*_STEM, *(f"{block}.branch{part}" for block, parts in _BLOCKS.items() for part in parts))

RULES: tuple[Rule, ...] = (*(rule for name in _CONVOLUTIONS for rule in _conv_norm(name)), *linear("fc", "fc"))
