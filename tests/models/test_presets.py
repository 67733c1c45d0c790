import pytest

from shortcut_jax.core.tree import count_parameters, flat_paths
from shortcut_jax.models.init import weight_shapes
from shortcut_jax.models.presets import PRESETS, preset


def _count(name):
    return count_parameters(weight_shapes(preset(name)))


@pytest.mark.parametrize(("name", "count"), [("flux-dev", 11_901_408_320), ("flux-schnell", 11_891_178_560)])
def test_flux_has_the_published_number_of_parameters(name, count):
    assert _count(name) == count


@pytest.mark.parametrize(
    ("name", "count"), [("flux-2.5b", 2.5e9), ("flux-600m", 600e6), ("flux-130m", 130e6), ("flux-30m", 31e6)]
)
def test_scaled_presets_have_the_size_in_their_name(name, count):
    assert _count(name) == pytest.approx(count, rel=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_heads_divide_the_width_and_rotary_axes_fill_a_head(name):
    cfg = preset(name)
    assert cfg.heads * cfg.head_size == cfg.width
    assert sum(cfg.axes) == cfg.head_size
    assert len(cfg.axes) == 3 and all(size % 2 == 0 for size in cfg.axes)


def test_only_flux_dev_has_a_guidance_embedding():
    assert [name for name in PRESETS if preset(name).guidance] == ["flux-dev"]


def test_an_unknown_preset_raises_and_names_the_choices():
    with pytest.raises(ValueError, match="flux-12b") as error:
        preset("flux-12b")
    assert all(name in str(error.value) for name in PRESETS)


def test_kernels_carry_their_parts_and_heads_as_axes():
    flat = flat_paths(weight_shapes(preset("flux-schnell")))
    for path, shape in {
        "double_blocks/img_attn/qkv/kernel": (19, 3072, 3, 24, 128),
        "double_blocks/txt_attn/qkv/kernel": (19, 3072, 3, 24, 128),
        "double_blocks/img_attn_out/kernel": (19, 24, 128, 3072),
        "double_blocks/txt_attn_out/kernel": (19, 24, 128, 3072),
        "single_blocks/attn/qkv/kernel": (38, 3072, 3, 24, 128),
        "single_blocks/mlp_in/kernel": (38, 3072, 12_288),
        "single_blocks/attn_out/kernel": (38, 24, 128, 3072),
        "single_blocks/mlp_out/kernel": (38, 12_288, 3072),
        "single_blocks/mlp_out/bias": (38, 3072),
    }.items():
        assert flat[path].shape == shape, path
    assert "single_blocks/attn_out/bias" not in flat  # one bias for both outputs of a single block
