"""Values that are not finite: refused where a file is read, by the name of the tensor, and where a sum overflows."""

import warnings

import ml_dtypes
import numpy as np
import pytest

from shortcut_jax.errors import ConversionError
from shortcut_jax.formats import export
from shortcut_jax.sources import models
from shortcut_jax.sources.models import open_lora, open_loras
from shortcut_jax.weights.lora import Merged, added, check_values
from shortcut_jax.weights.lora_files import to_kohya, to_peft
from shortcut_jax.weights.params import Cast
from tests.weights.lora_cases import CFG, random_modules

QKV = "lora_unet_double_blocks_1_img_attn_qkv"


@pytest.fixture(autouse=True)
def known_shapes(shapes, monkeypatch):
    """Those of the base, which take a second to trace."""
    monkeypatch.setattr(models, "param_shapes", lambda kind, config: shapes)


def _lora(folder, shapes, changes, names=to_kohya):
    modules = random_modules(shapes, keep=lambda n: n.startswith("transformer_blocks.1.attn.to_"))
    tensors, header = names(modules, shapes) if names is to_kohya else names(modules)
    export.write_tensors(folder / "lora.safetensors", tensors | changes(tensors), header)
    return folder / "lora.safetensors"


def _with(name, value, dtype):
    def change(tensors):
        changed = np.array(tensors[name]).astype(dtype)
        changed.reshape(-1)[-1] = value
        return {name: changed}

    return change


@pytest.mark.parametrize(
    ("name", "value", "dtype"),
    [
        (f"{QKV}.lora_down.weight", np.nan, "f4"),
        (f"{QKV}.lora_up.weight", -np.inf, "f2"),
        (f"{QKV}.lora_up.weight", np.nan, ml_dtypes.bfloat16),
        (f"{QKV}.lora_up.weight", np.nan, ml_dtypes.float8_e4m3fn),
        (f"{QKV}.lora_down.weight", np.nan, "f8"),
        (f"{QKV}.lora_down.weight", 1e300, "f8"),  # which overflows in float32
        (f"{QKV}.alpha", np.nan, "f4"),
        (f"{QKV}.alpha", np.inf, ml_dtypes.bfloat16),
    ],
)
def test_a_value_that_is_not_finite_is_refused_by_the_name_of_its_tensor(name, value, dtype, shapes, tmp_path):
    file = _lora(tmp_path, shapes, _with(name, value, dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConversionError, match=rf"^{name} has 1 of \d+ values that are NaN or infinite"):
            open_lora(file, CFG)


def test_the_name_is_that_in_the_file(shapes, tmp_path):
    name = "transformer.transformer_blocks.1.attn.to_q.lora_B.weight"
    with pytest.raises(ConversionError, match=f"^{name} has 1 of 96 values"):
        open_lora(_lora(tmp_path, shapes, _with(name, np.nan, "f4"), to_peft), CFG)


def test_an_alpha_of_zero_is_refused(shapes, tmp_path):
    with pytest.raises(ConversionError, match="the alpha of double_blocks_1_img_attn_qkv is 0"):
        open_lora(_lora(tmp_path, shapes, _with(f"{QKV}.alpha", 0, "f4")), CFG)


def test_adapters_from_elsewhere_are_checked_by_module(shapes):
    (name, f), *_ = random_modules(shapes).items()
    check_values({name: f})
    for bad in (f._replace(alpha=np.inf), f._replace(up=f.up * np.nan), f._replace(down=np.full_like(f.down, np.inf))):
        with pytest.raises(ConversionError, match=f"of the adapter of {name} has .* values that are NaN or infinite"):
            check_values({name: bad})


def test_a_sum_that_overflows_in_the_dtype_of_the_base_is_refused(params, shapes):
    modules = random_modules(shapes, keep=lambda n: n == "proj_out")
    small = {k: v.astype(np.float16) for k, v in params.items()}
    assert np.all(np.isfinite(Merged(small, modules, shapes)["final_linear/kernel"]))
    strong = {k: f._replace(alpha=1e6 * f.alpha) for k, f in modules.items()}
    assert np.all(np.isfinite(Merged(params, strong, shapes)["final_linear/kernel"]))
    for base in (small, Cast(params, np.dtype(np.float16))):
        with pytest.raises(ConversionError, match=r"final_linear/kernel has values that are not finite in float16"):
            Merged(base, strong, shapes)["final_linear/kernel"]
    broken = params | {"final_linear/kernel": params["final_linear/kernel"] * np.nan}
    with pytest.raises(ConversionError, match="or the base's own values are not finite"):
        Merged(broken, modules, shapes)["final_linear/kernel"]


def test_the_sum_of_several_is_that_of_their_products_whatever_their_ranks_and_modules(params, shapes, tmp_path):
    one = random_modules(shapes, rank=2, alpha=5.0, keep=lambda n: "attn" in n)
    two = random_modules(shapes, rank=lambda n: 1 + len(n) % 4, seed=2, keep=lambda n: "to_" in n or "proj" in n)
    whole = Merged(params, added([one, two]), shapes)
    in_turn = Merged(Merged(params, one, shapes), two, shapes)
    changed = set()
    for path, value in params.items():
        np.testing.assert_allclose(whole[path], in_turn[path], rtol=1e-5, atol=1e-5, err_msg=path)
        changed |= {path} if not np.array_equal(whole[path], value) else set()
    assert "double_blocks/img_attn/qkv/kernel" in changed and "img_in/kernel" not in changed
    files = []
    for name, modules in (("one", one), ("two", two)):
        export.write_tensors(tmp_path / f"{name}.safetensors", *to_peft(modules))
        files.append(tmp_path / f"{name}.safetensors")
    half, notes = open_loras([(files[0], 0.5), (files[1], -1.0)], CFG)
    f, g = (x["transformer_blocks.0.attn.to_q"] for x in (one, two))
    h = half["transformer_blocks.0.attn.to_q"]
    expected = 0.5 * f.scale * f.up @ f.down - g.scale * g.up @ g.down
    np.testing.assert_allclose(h.scale * h.up @ h.down, expected, rtol=1e-4, atol=1e-5)
    assert any(note.startswith("one.safetensors: alpha: from lora_adapter_metadata") for note in notes)
    with pytest.raises(ValueError, match="must be finite"):
        open_loras([(files[0], np.inf)], CFG)
