import json

import ml_dtypes
import numpy as np
import pytest

from shortcut_jax.core.tree import flat_paths
from shortcut_jax.models.presets import preset
from shortcut_jax.runtime.pretrained import open_pretrained
from shortcut_jax.runtime.safetensors import SafetensorsError, Writer
from shortcut_jax.weights import flux_bfl, flux_diffusers
from shortcut_jax.weights.params import Spec
from shortcut_jax.weights.rules import ConversionError, to_flax, to_torch

AXES = {"axes_dims_rope": [4, 6, 6]}


@pytest.fixture(scope="module")
def params():
    import jax

    from shortcut_jax.assemble import init_params

    shapes = flat_paths(jax.eval_shape(lambda key: init_params(preset("tiny"), key), jax.random.key(0)))
    rng = np.random.default_rng(0)
    return {k: rng.standard_normal(v.shape, np.float32) for k, v in shapes.items()}


def _save(file, values):
    with Writer(file, {k: Spec(v.dtype, v.shape) for k, v in values.items()}, {}) as writer:
        for name, value in values.items():
            writer.write(name, value)


def _opened_equals(path, params, kind="flux"):
    (model,) = open_pretrained(path)
    assert model.found.kind == kind and model.notes == ()
    back = to_flax(model.tensors, model.found.rules, {k: v.shape for k, v in params.items()})
    assert all(np.array_equal(back[k], params[k]) for k in params)


def test_a_comfy_file_and_a_sharded_folder_hold_the_same_model(tmp_path, params):
    (tmp_path / "config.json").write_text(json.dumps(AXES))
    comfy = {f"model.diffusion_model.{k}": v for k, v in to_torch(params, flux_bfl.RULES).items()}
    _save(tmp_path / "comfy.safetensors", comfy)
    _opened_equals(tmp_path / "comfy.safetensors", params)

    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(AXES))
    tensors = to_torch(params, flux_diffusers.RULES)
    names = sorted(tensors)
    files = {"m-1.safetensors": names[::2], "m-2.safetensors": names[1::2]}
    for file, part in files.items():
        _save(folder / file, {n: tensors[n] for n in part})
    index = {"weight_map": {n: file for file, part in files.items() for n in part}}
    (folder / "m.safetensors.index.json").write_text(json.dumps(index))
    _opened_equals(folder, params)
    _opened_equals(folder / "m.safetensors.index.json", params)
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    _opened_equals(tmp_path / "pipeline", params)


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
    _save(tmp_path / "f8.safetensors", stored)
    (tmp_path / "config.json").write_text(json.dumps(AXES))
    (model,) = open_pretrained(tmp_path / "f8.safetensors")
    assert set(model.tensors) == set(tensors)
    assert model.notes == (f"{sum('scale_weight' in n for n in stored)} float8 tensors are widened to float32",)
    for name, value in expected.items():
        np.testing.assert_array_equal(model.tensors[name], value, err_msg=name)
        assert np.linalg.norm(value - tensors[name]) <= 0.05 * np.linalg.norm(tensors[name])


def test_what_is_refused_is_named_with_the_way_out(tmp_path):
    for name, error, message in (
        ("flux.gguf", ConversionError, "is GGUF, which is quantised"),
        ("flux.ckpt", ConversionError, r"is a pickle.*save_file\(torch.load\('flux.ckpt', weights_only=True\)"),
        ("flux.txt", SafetensorsError, "cut off or not a safetensors file"),
    ):
        (tmp_path / name).write_bytes(b"x" * 100)
        with pytest.raises(error, match=message):
            open_pretrained(tmp_path / name)
    with pytest.raises(SafetensorsError, match="nowhere is not there"):
        open_pretrained(tmp_path / "nowhere")
    _save(tmp_path / "nf4.safetensors", {"a.weight.quant_state.bitsandbytes__nf4": np.zeros(3, np.uint8)})
    with pytest.raises(ConversionError, match="quantised to NF4"):
        open_pretrained(tmp_path / "nf4.safetensors")


def test_a_scale_may_be_one_a_row(tmp_path):
    from shortcut_jax.runtime.pretrained import _Part
    from shortcut_jax.runtime.safetensors import LazyTensors

    stored = {
        "a.weight": np.ones((3, 2), ml_dtypes.float8_e4m3fn),
        "a.weight_scale": np.array([1, 2, 3], np.float32),
        "b.weight": np.ones((3, 2), ml_dtypes.float8_e4m3fn),
        "b.weight_scale": np.array([[1], [2], [3]], np.float32),
        "c.weight": np.ones((3, 2), ml_dtypes.float8_e4m3fn),
        "c.scale_weight": np.array([4], np.float32),
    }
    _save(tmp_path / "x.safetensors", stored)
    part = _Part(LazyTensors([tmp_path / "x.safetensors"]), {f"{n}.weight": f"{n}.weight" for n in "abc"})
    for name in "ab":
        np.testing.assert_array_equal(part[f"{name}.weight"], [[1, 1], [2, 2], [3, 3]])
    np.testing.assert_array_equal(part["c.weight"], np.full((3, 2), 4))


def test_relatives_with_the_shapes_of_flux_are_refused_by_name(tmp_path, params):
    tensors = to_torch(params, flux_bfl.RULES)
    _save(tmp_path / "flux1-kontext-dev.safetensors", tensors)
    with pytest.raises(ConversionError, match=r"flux1-kontext-dev\.safetensors is FLUX\.1 Kontext"):
        open_pretrained(tmp_path / "flux1-kontext-dev.safetensors")
    for name, message in (("Kontext", "Kontext"), ("Fill", "Fill"), ("Control", "Canny")):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": f"Flux{name}Pipeline"}))
        with pytest.raises(ConversionError, match=rf"Flux{name}Pipeline is FLUX\.1 {message}"):
            open_pretrained(tmp_path)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(AXES))
    _save(tmp_path / "transformer" / "m.safetensors", to_torch(params, flux_diffusers.RULES))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxKontextPipeline"}))
    with pytest.raises(ConversionError, match="Kontext"):
        open_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxControlNetPipeline"}))
    assert open_pretrained(tmp_path)[0].found.kind == "flux"


def test_a_pipeline_folder_has_everything_that_its_index_names(tmp_path, params):
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(AXES))
    _save(tmp_path / "transformer" / "m.safetensors", to_torch(params, flux_diffusers.RULES))
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "vae": [None, None]}))
    assert len(open_pretrained(tmp_path)) == 1
    absent = {"text_encoder_2": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    (tmp_path / "model_index.json").write_text(json.dumps({**index, **absent}))
    with pytest.raises(ConversionError, match="names text_encoder_2, tokenizer, which is not there"):
        open_pretrained(tmp_path)


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
        _save(tmp_path / "x.safetensors", {**source, **change})
        with pytest.raises(ConversionError, match=message):
            open_pretrained(tmp_path / "x.safetensors")


def test_two_embeddings_of_t5_have_to_be_one(tmp_path):
    from tests.weights.test_text import T5, _t5, _weights

    weights = _weights(_t5())
    table = "encoder.embed_tokens.weight"
    weights = {k: v for k, v in weights.items() if k != table}
    for twin, fine in ((weights["shared.weight"], True), (weights["shared.weight"] + 1, False)):
        _save(tmp_path / "t5.safetensors", {**weights, table: twin})
        if fine:
            (model,) = open_pretrained(tmp_path / "t5.safetensors")
            assert model.found.config.width == T5.width and "left out: encoder.embed_tokens" in model.notes[0]
        else:
            with pytest.raises(ConversionError, match="should be one table, but differ"):
                open_pretrained(tmp_path / "t5.safetensors")
