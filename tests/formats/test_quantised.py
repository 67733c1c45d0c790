import json

import ml_dtypes
import numpy as np
import pytest

from shortcut_jax.errors import ConversionError
from shortcut_jax.formats.pretrained import open_pretrained
from shortcut_jax.formats.quantised import METADATA_KEY, Widened
from shortcut_jax.formats.safetensors import LazyTensors
from shortcut_jax.weights import flux_bfl
from tests.formats.conftest import AXES, save
from tests.helpers import to_torch


def test_float8_weights_are_widened_by_their_scales_and_it_is_told(tmp_path, params):
    tensors = to_torch(params, flux_bfl.RULES)
    stored, expected = {}, {}
    for name, value in tensors.items():
        if name.endswith("weight") and "blocks" in name:
            scale = np.float32(np.abs(value).max() / 448)
            stored[name] = (value / scale).astype(ml_dtypes.float8_e4m3fn)
            stored[name.replace(".weight", ".scale_weight")] = scale.reshape(())
            expected[name] = stored[name].astype(np.float32) * scale
        else:
            stored[name] = expected[name] = value
    stored["scaled_fp8"] = np.zeros(2, ml_dtypes.float8_e4m3fn)
    save(tmp_path / "f8.safetensors", stored)
    (tmp_path / "config.json").write_text(json.dumps(AXES))
    (model,) = open_pretrained(tmp_path / "f8.safetensors")
    assert set(model.tensors) == set(tensors)
    assert model.notes == (f"{sum('scale_weight' in n for n in stored)} float8 tensors are widened to float32",)
    for name, value in expected.items():
        np.testing.assert_array_equal(model.tensors[name], value, err_msg=name)
        assert np.linalg.norm(value - tensors[name]) <= 0.05 * np.linalg.norm(tensors[name])


def test_a_scale_may_be_one_a_row(tmp_path):
    stored = {
        "a.weight": np.ones((3, 2), ml_dtypes.float8_e4m3fn),
        "a.weight_scale": np.array([1, 2, 3], np.float32),
        "b.weight": np.ones((3, 2), ml_dtypes.float8_e4m3fn),
        "b.weight_scale": np.array([[1], [2], [3]], np.float32),
        "c.weight": np.ones((3, 2), ml_dtypes.float8_e4m3fn),
        "c.scale_weight": np.array([4], np.float32),
    }
    save(tmp_path / "x.safetensors", stored)
    part = Widened(LazyTensors([tmp_path / "x.safetensors"]), {f"{n}.weight": f"{n}.weight" for n in "abc"})
    for name in "ab":
        np.testing.assert_array_equal(part[f"{name}.weight"], [[1, 1], [2, 2], [3, 3]])
    np.testing.assert_array_equal(part["c.weight"], np.full((3, 2), 4))


def test_scales_that_would_be_dropped_or_misread_are_refused(tmp_path, params):
    (tmp_path / "config.json").write_text(json.dumps(AXES))
    tensors = to_torch(params, flux_bfl.RULES)
    name = "double_blocks.0.img_attn.proj"
    small = {**tensors, f"{name}.weight": tensors[f"{name}.weight"].astype(ml_dtypes.float8_e4m3fn)}
    ones = np.ones
    for source, change, message in (
        (tensors, {f"{name}.weight_scale": ones(1, "f")}, "is not a float8 weight beside it"),
        (small, {"nowhere.scale_weight": ones(1, "f")}, "nowhere.weight is not a float8 weight"),
        (small, {f"{name}.weight_scale": ones((1, 32), "f")}, r"has shape \(1, 32\), but one scale"),
        (small, {f"{name}.weight_scale": ones((4, 4), "f")}, r"has shape \(4, 4\), but one scale"),
        (tensors, {f"{name}.weight": ones((32, 32), "i1")}, "is int8: quantised otherwise than float8"),
    ):
        save(tmp_path / "x.safetensors", {**source, **change})
        with pytest.raises(ConversionError, match=message):
            open_pretrained(tmp_path / "x.safetensors")


def _float8(params, told, scale="weight_scale"):
    """A file of Black Forest Labs' names with one float8 layer, and what is told of it as ComfyUI does."""
    tensors, layer = to_torch(params, flux_bfl.RULES), "double_blocks.0.img_attn.proj"
    value = tensors[f"{layer}.weight"]
    factor = np.float32(np.abs(value).max() / 448)
    tensors[f"{layer}.weight"] = (value / factor).astype(ml_dtypes.float8_e4m3fn)
    tensors[f"{layer}.{scale}"] = factor.reshape(())
    if told is not None:
        tensors[f"{layer}.comfy_quant"] = np.frombuffer(json.dumps(told).encode(), np.uint8)
    return tensors, f"{layer}.weight", value


@pytest.mark.parametrize("further", [{}, {"full_precision_matrix_mult": True}])
def test_formats_that_comfyui_tells_of_float8_are_checked_and_left_out(tmp_path, params, further):
    (tmp_path / "config.json").write_text(json.dumps(AXES))
    told = {"format": "float8_e4m3fn", **further}
    tensors, weight, value = _float8(params, told)
    header = {METADATA_KEY: json.dumps({"format_version": "1.0", "layers": {"double_blocks.0.img_attn.proj": told}})}
    for prefix in ("", "model.diffusion_model."):
        save(tmp_path / "x.safetensors", {f"{prefix}{n}": v for n, v in tensors.items()}, header)
        (model,) = open_pretrained(tmp_path / "x.safetensors")
        assert set(model.tensors) == set(to_torch(params, flux_bfl.RULES))
        assert model.notes == (
            "1 float8 tensors are widened to float32",
            "1 comfy_quant entries, which say that these are float8, are left out",
        )
        assert 0 < np.linalg.norm(model.tensors[weight] - value) <= 0.05 * np.linalg.norm(value)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"format": "nvfp4"}, "proj is quantised to nvfp4, which is not supported: take the bfloat16 release"),
        ({"format": "mxfp8"}, "proj is quantised to mxfp8, which is not supported"),
        ({"format": "float8_e5m2"}, "says float8_e5m2, but double_blocks.0.img_attn.proj.weight is not of that dtype"),
        ({"format": "float8_e4m3fn", "convrot": True}, "is quantised to float8_e4m3fn with convrot, which is not"),
        (["float8_e4m3fn"], "proj.comfy_quant is not a JSON object"),
    ],
)
def test_other_formats_that_comfyui_tells_are_refused_by_name(tmp_path, params, told, message):
    tensors, *_ = _float8(params, told)
    save(tmp_path / "x.safetensors", tensors)
    with pytest.raises(ConversionError, match=message):
        open_pretrained(tmp_path / "x.safetensors")


def test_a_format_in_the_header_and_a_lost_scale_are_refused_too(tmp_path, params):
    layers = {"double_blocks.0.img_attn.proj": {"format": "int8_blockwise", "group_size": 128}}
    tensors, *_ = _float8(params, None)
    save(tmp_path / "x.safetensors", tensors, {METADATA_KEY: json.dumps({"layers": layers})})
    with pytest.raises(ConversionError, match="proj is quantised to int8_blockwise, which is not supported"):
        open_pretrained(tmp_path / "x.safetensors")
    tensors, *_ = _float8(params, {"format": "float8_e4m3fn"}, scale="input_scale")
    save(tmp_path / "x.safetensors", tensors)
    with pytest.raises(ConversionError, match=r"but there is no double_blocks.0.img_attn.proj.weight_scale"):
        open_pretrained(tmp_path / "x.safetensors")


LAYER, OTHER = "double_blocks.0.img_attn.proj", "double_blocks.0.txt_attn.proj"


def _refused(tmp_path, tensors, message, metadata=None):
    save(tmp_path / "x.safetensors", tensors, metadata)
    with pytest.raises(ConversionError, match=message):
        open_pretrained(tmp_path / "x.safetensors")


def test_a_float8_weight_that_lost_its_scale_is_refused_where_others_have_one_or_a_marker_says_so(tmp_path, params):
    (tmp_path / "config.json").write_text(json.dumps(AXES))
    tensors, *_ = _float8(params, None)
    plain = {k: v for k, v in tensors.items() if not k.endswith("weight_scale")}
    plain[f"{OTHER}.weight"] = plain[f"{OTHER}.weight"].astype(ml_dtypes.float8_e4m3fn)
    save(tmp_path / "x.safetensors", plain)
    assert open_pretrained(tmp_path / "x.safetensors")[0].notes == ("2 float8 tensors are widened to float32",)
    lost = rf"^{OTHER}\.weight is float8 without a scale"
    scale = {f"{LAYER}.weight_scale": np.ones((), "f")}
    _refused(tmp_path, plain | scale, lost)
    _refused(tmp_path, {**plain, "scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn)}, "is float8 without a scale")
    both = {f"{n}.weight_scale": np.ones((), "f") for n in (LAYER, OTHER)}
    save(tmp_path / "x.safetensors", plain | both)
    assert len(open_pretrained(tmp_path / "x.safetensors")) == 1
    _refused(tmp_path, plain | both | {f"{LAYER}.scale_weight": np.ones((), "f")}, r"proj\.weight has two scales")


def test_a_scaled_text_encoder_does_not_make_the_transformer_beside_it_scaled(tmp_path, params):
    from tests.weights.test_text import _t5, _weights

    (tmp_path / "config.json").write_text(json.dumps(AXES))
    flux, *_ = _float8(params, None)
    flux = {f"model.diffusion_model.{k}": v for k, v in flux.items() if not k.endswith("weight_scale")}
    t5 = {f"t5.{k}": v for k, v in _weights(_t5()).items()}
    name = next(n for n in t5 if n.endswith("SelfAttention.q.weight"))
    t5[name] = t5[name].astype(ml_dtypes.float8_e4m3fn)
    t5 |= {name.replace(".weight", ".scale_weight"): np.ones((), "f")}
    t5["t5.scaled_fp8"] = np.zeros(2, ml_dtypes.float8_e4m3fn)
    save(tmp_path / "x.safetensors", flux | t5)
    assert [m.found.kind for m in open_pretrained(tmp_path / "x.safetensors")] == ["flux", "t5"]


def test_what_the_header_says_of_float8_is_checked(tmp_path, params):
    (tmp_path / "config.json").write_text(json.dumps(AXES))
    told = {"format": "float8_e4m3fn"}
    header = lambda layers: {METADATA_KEY: json.dumps({"layers": layers})}
    tensors, *_ = _float8(params, None)
    _refused(tmp_path, tensors, rf"metadata says .*, but {OTHER}\.weight is not of that", header({OTHER: told}))
    _refused(tmp_path, tensors, "but x.weight is not of that dtype", header({"x": told}))
    lost = {k: v for k, v in tensors.items() if not k.endswith("weight_scale")}
    _refused(tmp_path, lost, rf"metadata says .* but there is no {LAYER}\.weight_scale", header({LAYER: told}))
    for layers in ([], None, {LAYER: "float8_e4m3fn"}):
        _refused(tmp_path, tensors, "are not JSON objects by layer", header(layers))


def test_single_values_and_whole_numbers_are_refused_and_float64_is_rounded(tmp_path, params):
    (tmp_path / "config.json").write_text(json.dumps(AXES))
    tensors = to_torch(params, flux_bfl.RULES)
    point = {f"{LAYER}.weight": np.ones((), ml_dtypes.float8_e4m3fn), f"{LAYER}.weight_scale": np.ones((), "f")}
    _refused(tmp_path, tensors | point, "is a single float8 value")
    whole = {"img_in.bias": np.ones(tensors["img_in.bias"].shape, np.int64)}
    _refused(tmp_path, tensors | whole, r"^img_in\.bias is int64: no parameter of a model is a whole number")
    double = tensors["img_in.bias"].astype(np.float64) + 1e-12
    save(tmp_path / "x.safetensors", tensors | {"img_in.bias": double})
    (model,) = open_pretrained(tmp_path / "x.safetensors")
    assert model.notes == ("1 float64 tensors are rounded to float32",)
    assert model.tensors["img_in.bias"].dtype == np.float32 == model.tensors.spec("img_in.bias").dtype
    np.testing.assert_array_equal(model.tensors["img_in.bias"], double.astype("f"))
