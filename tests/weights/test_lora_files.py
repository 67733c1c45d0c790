import inspect
import json
import logging

import ml_dtypes
import numpy as np
import pytest

from shortcut_jax.errors import ConversionError
from shortcut_jax.formats import export
from shortcut_jax.weights import flux_diffusers
from shortcut_jax.weights.lora import Factors, Merged, expand, stack
from shortcut_jax.weights.lora_files import METADATA_KEY, kohya_notes, read, to_kohya, to_peft
from shortcut_jax.weights.lora_names import is_lora
from tests.helpers import relative, to_torch
from tests.weights.lora_cases import CFG, RANKS, apply_flux, collections, random_modules

LAST = ("norm_out.linear", "proj_out")


def _same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, f in expected.items():
        assert actual[name].alpha == f.alpha, name
        np.testing.assert_array_equal(actual[name].down, f.down, err_msg=name)
        np.testing.assert_array_equal(actual[name].up, f.up, err_msg=name)


def _reference(params):
    """A diffusers transformer with these weights."""
    import torch
    from diffusers import FluxTransformer2DModel

    geometry = dict(num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, in_channels=4)
    widths = dict(joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(4, 6, 6))
    model = FluxTransformer2DModel(**geometry, **widths).eval()
    model.load_state_dict({k: torch.from_numpy(v) for k, v in to_torch(params, flux_diffusers.RULES).items()})
    return model


def _run_reference(model):
    """The output for the inputs of `apply_flux`."""
    import torch

    from shortcut_jax.core.latents import image_ids, text_ids

    rng = np.random.default_rng(3)
    draw = lambda *shape: torch.from_numpy(rng.standard_normal(shape, np.float32))
    x, txt, vec = draw(2, 8, 4), draw(2, 3, 64), draw(2, 64)
    ids = (torch.from_numpy(np.array(i)) for i in (image_ids(4, 8), text_ids(3)))
    args = dict(zip(("img_ids", "txt_ids"), ids, strict=True))
    t, guidance = torch.tensor([0.9, 0.2]), torch.tensor([3.5, 1.0])
    with torch.no_grad():
        return model(x, txt, vec, t, **args, guidance=guidance).sample.numpy()


def _torch(tensors):
    import torch

    return {k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}


@pytest.mark.parametrize("name", ["all", "some modules", "several ranks"])
def test_a_peft_file_goes_out_as_it_came(name, shapes):
    modules = random_modules(shapes, **RANKS[name])
    tensors, metadata = to_peft(modules)
    assert is_lora(tensors) and (METADATA_KEY in metadata) == (name == "several ranks")
    config = {k.removeprefix("transformer."): v for k, v in json.loads(metadata.get(METADATA_KEY, "{}")).items()}
    back, notes = read(tensors, shapes, config)
    _same(back, modules)
    again, header = to_peft(back)
    assert notes == () and header == metadata and list(again) == list(tensors)
    assert all(np.array_equal(again[k], v) for k, v in tensors.items())


@pytest.mark.parametrize("name", ["all", "several ranks"])
def test_diffusers_loads_what_we_write_with_the_same_output(
    name, params, shapes, highest_precision, exact_frequencies, caplog, monkeypatch, tmp_path
):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)  # else nothing reaches `caplog`
    # PEFT finds a module by the end of its name, so the last layer would take the blocks' `proj_out` with it.
    modules = random_modules(shapes, **RANKS[name])
    tensors, metadata = to_peft(modules)
    model = _reference(params)
    config = json.loads(metadata[METADATA_KEY]) if METADATA_KEY in metadata else None
    model.load_lora_adapter(_torch(tensors), metadata=config)
    assert "unexpected" not in caplog.text and "missing" not in caplog.text
    # No key missing, none unexpected: what the model holds now is what we wrote.
    loaded = {k.replace(".default_0.", "."): v for k, v in model.state_dict().items() if "lora_" in k}
    assert loaded.keys() == {k.removeprefix("transformer.") for k in tensors}
    assert all(np.array_equal(loaded[k.removeprefix("transformer.")], v) for k, v in tensors.items())
    # The file itself, with its header, by its path.
    export.write_tensors(tmp_path / "lora.safetensors", tensors, metadata)
    by_path = _reference(params)
    by_path.load_lora_adapter(str(tmp_path), weight_name="lora.safetensors")
    np.testing.assert_array_equal(_run_reference(by_path), _run_reference(model))
    actual = apply_flux(CFG, params, collections(modules, shapes))
    assert relative(actual, _run_reference(model)) <= 1e-5
    assert relative(actual, _run_reference(_reference(params))) > 1e-2


def _kohya_conversion():
    """Diffusers' own kohya -> PEFT conversion, whose source fixes the widths of Flux, for ours."""
    import torch
    from diffusers.loaders import lora_conversion_utils as utils

    function = utils._convert_kohya_flux_lora_to_diffusers
    source = inspect.getsource(function)
    assert "dims=[3072, 3072, 3072, 12288]" in source
    names = {**vars(utils), "torch": torch}
    exec(source.replace("dims=[3072, 3072, 3072, 12288]", "dims=[32, 32, 32, 128]"), names)
    return names[function.__name__]


@pytest.mark.parametrize("name", ["all", "some modules", "several ranks"])
def test_kohya_names_are_those_that_diffusers_splits_back(name, shapes):
    modules = random_modules(shapes, **RANKS[name])
    tensors, _ = to_kohya(modules, shapes)
    theirs = _kohya_conversion()(_torch(tensors))
    # Outside the blocks diffusers' conversion forgets the prefix, without which its pipeline drops them.
    bare = {k.rsplit(".lora_", 1)[0] for k in theirs if not k.startswith("transformer.")}
    assert bare == {module for module in modules if "blocks." not in module}
    (note,) = kohya_notes(modules) or ("()",)
    assert note.split("(")[1].split(")")[0] == ", ".join(m for m in modules if m in bare)
    found = {k.removeprefix("transformer."): v.numpy() for k, v in theirs.items()}
    for module, f in modules.items():
        down, up = (found.pop(f"{module}.{half}.weight") for half in ("lora_A", "lora_B"))
        np.testing.assert_allclose(up @ down, f.scale * f.up @ f.down, rtol=1e-4, atol=1e-5, err_msg=module)
        if name == "all":
            assert len(down) == 3
    assert not any(v.any() for v in found.values())  # what is left are the zeros of parts without an adapter


def test_fused_files_are_split_back_bit_for_bit(shapes):
    modules = random_modules(shapes, alpha=5.0)
    tensors, _ = to_kohya(modules, shapes)
    assert tensors["lora_unet_single_blocks_0_linear1.lora_down.weight"].shape == (4 * 3, 32)
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"].shape == (96, 3 * 3)
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.alpha"] == 15.0  # alpha / rank is kept
    back, _ = read(tensors, shapes)
    for name in LAST:  # their alpha is multiplied in
        f, modules[name] = modules[name], back[name]
        assert back[name].scale == 1 and np.array_equal(back[name].down, f.down)
        np.testing.assert_allclose(back[name].up, f.scale * f.up, rtol=1e-6)
    _same(back, modules)
    dotted = {k.replace("lora_unet_img_in", "diffusion_model.img_in"): v for k, v in tensors.items()}
    _same(read(dotted, shapes)[0], modules)


def test_a_scale_of_the_last_layers_that_a_dtype_cannot_hold_makes_them_float32(shapes):
    for alpha, dtype in ((6.0, ml_dtypes.bfloat16), (5.0, np.float32)):
        modules = random_modules(shapes, keep=lambda n: n in LAST, alpha=alpha, dtype=ml_dtypes.bfloat16)
        tensors, _ = to_kohya(modules, shapes)
        assert tensors["lora_unet_final_layer_linear.lora_up.weight"].dtype == dtype
        assert tensors["lora_unet_final_layer_linear.alpha"] == 3
        up = tensors["lora_unet_final_layer_linear.lora_up.weight"].astype("f")
        np.testing.assert_allclose(up, alpha / 3 * modules["proj_out"].up.astype("f"), rtol=1e-6)


def test_a_module_of_another_base_is_not_dropped(shapes):
    modules = random_modules(shapes, keep=lambda n: n in LAST)
    modules["single_transformer_blocks.9.attn.to_q"] = modules["proj_out"]
    with pytest.raises(ConversionError, match=r"without a layer in this base: single_transformer_blocks\.9\."):
        to_kohya(modules, shapes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": "x"}, "says lora_alpha 'x', which is not a number"),
        ({"lora_alpha": None}, "says lora_alpha None, which is not a number"),
        ({"lora_alpha": [8]}, r"says lora_alpha \[8\], which is not a number"),
        ({"alpha_pattern": {"a(": 2}}, r"alpha_pattern 'a\(' is not a regular expression"),
        ({"alpha_pattern": {"a": "2"}}, "says a '2', which is not a number"),
        ({"alpha_pattern": ["a"]}, r"alpha_pattern \['a'\], which is not a JSON object"),
    ],
)
def test_a_config_of_peft_of_another_kind_is_named(shapes, config, message):
    tensors, _ = to_peft(random_modules(shapes, keep=lambda n: n in LAST))
    with pytest.raises(ConversionError, match=message):
        read(tensors, shapes, config)


def test_whole_numbers_are_no_adapters_and_float64_is_rounded_and_told(shapes):
    tensors, _ = to_peft(random_modules(shapes, keep=lambda n: n == "proj_out"))
    name = "transformer.proj_out.lora_A.weight"
    modules, notes = read({**tensors, name: tensors[name].astype(np.float64)}, shapes)
    assert notes == ("1 float64 tensors are rounded to float32",) and modules["proj_out"].down.dtype == np.float32
    with pytest.raises(ConversionError, match="the factors of proj_out are whole numbers"):
        read({**tensors, name: tensors[name].astype(np.int64)}, shapes)


def test_a_fresh_adapter_survives_fusing(shapes):
    modules = {k: f._replace(up=np.zeros_like(f.up)) for k, f in random_modules(shapes).items()}
    _same(read(to_kohya(modules, shapes)[0], shapes)[0], modules)


def test_parts_of_unequal_rank_and_scale_are_fused_to_the_same_function(params, shapes):
    modules = random_modules(shapes, **RANKS["several ranks"])
    back, _ = read(to_kohya(modules, shapes)[0], shapes)
    one, two = Merged(params, modules, shapes), Merged(params, back, shapes)
    for path in params:
        np.testing.assert_allclose(one[path], two[path], rtol=1e-4, atol=1e-5, err_msg=path)


def test_a_fused_file_with_one_a_is_copied_to_its_parts_and_goes_out_unchanged(params, shapes):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    tensors = {
        "lora_unet_single_blocks_1_linear1.lora_down.weight": draw(4, 32),
        "lora_unet_single_blocks_1_linear1.lora_up.weight": draw(3 * 32 + 128, 4),
        "lora_unet_single_blocks_1_linear1.alpha": np.float32(2.0),
        "lora_unet_double_blocks_0_txt_attn_qkv.lora_down.weight": draw(3, 32),
        "lora_unet_double_blocks_0_txt_attn_qkv.lora_up.weight": draw(96, 3),
        "lora_unet_double_blocks_0_txt_attn_qkv.alpha": np.float32(3.0),
    }
    modules, _ = read(tensors, shapes)
    assert len(modules) == 7 and {f.scale for f in modules.values()} == {0.5, 1.0}
    again, _ = to_kohya(modules, shapes)
    assert again.keys() == tensors.keys()
    assert all(np.array_equal(again[k], v) for k, v in tensors.items())
    merged = Merged(params, modules, shapes)
    down, up = (tensors[f"lora_unet_single_blocks_1_linear1.lora_{half}.weight"] for half in ("down", "up"))
    delta = 0.5 * (up @ down).T
    qkv = merged["single_blocks/attn/qkv/kernel"] - params["single_blocks/attn/qkv/kernel"]
    mlp = merged["single_blocks/mlp_in/kernel"] - params["single_blocks/mlp_in/kernel"]
    np.testing.assert_allclose(qkv[1].reshape(32, 96), delta[:, :96], atol=1e-5)
    np.testing.assert_allclose(mlp[1], delta[:, 96:], atol=1e-5)
    assert not qkv[0].any() and not mlp[0].any()


@pytest.mark.parametrize("prefix", ["transformer.", "base_model.model.", "base_model.model.transformer.", ""])
def test_prefixes_and_older_spellings_are_read(prefix, shapes):
    modules = random_modules(shapes)
    tensors = {k.replace("transformer.", prefix, 1): v for k, v in to_peft(modules)[0].items()}
    _same(read(tensors, shapes)[0], modules)
    older = {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for k, v in tensors.items()}
    _same(read(older, shapes)[0], modules)
    named = {k.replace(".weight", ".default.weight"): v for k, v in tensors.items()}
    _same(read(named, shapes)[0], modules)


def test_alphas_come_from_tensors_then_from_the_config(shapes):
    keep = lambda n: n.endswith("to_q")
    modules = random_modules(shapes, rank=4, keep=keep)
    tensors, _ = to_peft(modules)
    config = {"lora_alpha": 8, "alpha_pattern": {"single_transformer_blocks.0.attn.to_q": 2}}
    back, _ = read(tensors, shapes, config)
    assert back["transformer_blocks.0.attn.to_q"].alpha == 8
    assert back["single_transformer_blocks.0.attn.to_q"].alpha == 2
    assert read(tensors, shapes, {"lora_alpha": 8, "use_rslora": True})[0]["transformer_blocks.0.attn.to_q"].scale == 4
    tensors["transformer.transformer_blocks.0.attn.to_q.alpha"] = np.float32(1.0)
    assert read(tensors, shapes, config)[0]["transformer_blocks.0.attn.to_q"].alpha == 1.0


def test_what_cannot_be_used_is_named(shapes):
    keep = lambda n: n == "transformer_blocks.0.attn.to_q"
    tensors, _ = to_peft(random_modules(shapes, keep=keep))
    a = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    for change, message in (
        (
            {"transformer.transformer_blocks.0.attn.to_q.dora_scale": np.ones(3)},
            "dora_scale is not part of a plain LoRA",
        ),
        ({"lora_unet_img_in.hada_w1_a": np.ones(3)}, "hada_w1_a is not part of a plain LoRA"),
        ({a: None}, r"no A \(lora_down\) for transformer\.transformer_blocks\.0\.attn\.to_q"),
        ({a.replace("to_q", "to_z"): np.ones((3, 32))}, "to_z, which is not a layer of this base; nearest known name"),
        ({a: np.ones((3, 48), "f")}, "maps 48 channels to 32, the base's layer 32 to 32"),
    ):
        changed = {k: v for k, v in (tensors | change).items() if v is not None}
        with pytest.raises(ConversionError, match=message):
            read(changed, shapes)
    for broken in (np.ones((3, 32, 1, 1), "f"), np.ones((0, 32), "f"), np.ones(3, "f")):
        with pytest.raises(ConversionError, match=r"the factors of transformer_blocks\.0\.attn\.to_q have shapes"):
            read({**tensors, a: broken}, shapes)
    with pytest.raises(ConversionError, match="is not one number"):
        read({**tensors, "transformer.transformer_blocks.0.attn.to_q.alpha": np.ones(2, "f")}, shapes)
    with pytest.raises(ConversionError, match="DoRA"):
        read(tensors, shapes, {"use_dora": True})
    wide = {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": np.ones((3, 32), "f")}
    wide["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"] = np.ones((99, 3), "f")
    with pytest.raises(ConversionError, match="maps 32 channels to 99, the base's layer 32 to 96"):
        read(wide, shapes)
    _, notes = read({**tensors, "lora_te1_x.lora_down.weight": np.ones(3)}, shapes)
    assert notes == ("1 tensors of text encoder adapters are left out: only the transformer's are used",)


def test_arrays_of_a_real_base_are_named_by_layer(shapes):
    modules = {next(n for n, _, _ in expand(shapes)): Factors(np.ones((2, 4), "f"), np.ones((32, 2), "f"), 2.0)}
    assert set(stack(modules, shapes)) == {"img_in/a", "img_in/b"}
