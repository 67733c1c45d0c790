import numpy as np
import pytest

from shortcut_jax.errors import ConversionError
from shortcut_jax.weights.lora import UNITS, Merged, check, record_of, stack, unstack
from tests.helpers import relative
from tests.weights.lora_cases import CFG, RANKS, apply_flux, collections, random_modules


def test_every_linear_layer_has_a_unit_and_q_k_v_one_each(shapes):
    kernels = {path.removesuffix("/kernel") for path in shapes if path.endswith("/kernel")}
    assert {t for unit in UNITS for t in unit.targets} - {"step_in/in_layer"} == kernels
    arrays = stack(random_modules(shapes), shapes)
    assert arrays["double_blocks/img_attn/qkv/a"].shape == (2, 32, 3, 3)  # depth, D, parts, r
    assert arrays["double_blocks/img_attn/qkv/b"].shape == (2, 3, 3, 2, 16)  # depth, r, parts, H, K
    assert arrays["double_blocks/img_attn_out/a"].shape == (2, 2, 16, 3)
    assert arrays["single_blocks/attn_out/a"].shape == (2, 2, 16, 3)
    assert arrays["single_blocks/mlp_out/a"].shape == (2, 128, 3)
    assert arrays["single_blocks/mlp_out/b"].shape == (2, 3, 32)
    assert "single_blocks/attn_out/b" not in arrays  # shared with the MLP's
    assert arrays["final_modulation/linear/b"].shape == (3, 2, 32)


@pytest.mark.parametrize("name", RANKS)
def test_there_and_back_is_the_identity(name, shapes):
    import ml_dtypes

    changes = RANKS[name]
    if changes.get("dtype") == "bfloat16":
        changes = {"dtype": ml_dtypes.bfloat16}
    modules = random_modules(shapes, **changes)
    arrays = stack(modules, shapes)
    back = unstack(arrays, record_of(modules), shapes)
    assert back.keys() == modules.keys()
    for module, f in modules.items():
        assert back[module].alpha == f.alpha and back[module].down.dtype == f.down.dtype
        np.testing.assert_array_equal(back[module].down, f.down, err_msg=module)
        np.testing.assert_array_equal(back[module].up, f.up, err_msg=module)


@pytest.mark.parametrize("name", ["all", "some modules", "several ranks"])
def test_adapters_beside_the_base_equal_the_merged_base(name, params, shapes, highest_precision):
    modules = random_modules(shapes, **RANKS[name])
    merged = dict(Merged(params, modules, shapes))
    beside = apply_flux(CFG, params, collections(modules, shapes))
    assert relative(beside, apply_flux(CFG, merged)) < 1e-5
    assert relative(beside, apply_flux(CFG, params)) > 1e-2


def test_merging_keeps_the_dtype_and_touches_adapted_kernels_only(params, shapes):
    import ml_dtypes

    modules = random_modules(shapes, keep=lambda n: "to_k" in n)
    small = {k: v.astype(ml_dtypes.bfloat16) for k, v in params.items()}
    merged = Merged(small, modules, shapes)
    changed = {k for k in small if not np.array_equal(merged[k], small[k])}
    assert changed == {"double_blocks/img_attn/qkv/kernel", "single_blocks/attn/qkv/kernel"}
    qkv, before = (x["single_blocks/attn/qkv/kernel"] for x in (merged, small))
    assert qkv.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(qkv[:, :, [0, 2]], before[:, :, [0, 2]])
    f = modules["single_transformer_blocks.1.attn.to_k"]
    expected = before[1, :, 1].astype("f").reshape(32, -1) + f.scale * (f.up @ f.down).T
    np.testing.assert_allclose(qkv[1, :, 1].astype("f").reshape(32, -1), expected, rtol=1e-2, atol=1e-3)


def test_adapters_of_another_base_are_named(shapes):
    modules = random_modules(shapes, keep=lambda n: n == "transformer_blocks.1.attn.to_q")
    f = modules["transformer_blocks.1.attn.to_q"]
    with pytest.raises(ConversionError, match=r"to_q maps 32 channels to 33, the base's layer 32 to 32"):
        check({"transformer_blocks.1.attn.to_q": f._replace(up=np.zeros((33, 3)))}, shapes)
    with pytest.raises(ConversionError, match=r"transformer_blocks\.2\.attn\.to_q has no layer in this base"):
        check({"transformer_blocks.2.attn.to_q": f}, shapes)
    with pytest.raises(ConversionError, match="ranks differ"):
        check({"transformer_blocks.1.attn.to_q": f._replace(up=np.zeros((32, 4)))}, shapes)
