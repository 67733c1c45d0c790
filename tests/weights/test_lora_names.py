"""LoRA files as people have them: each is a small file of real names, read from the disk."""

import json

import numpy as np
import pytest
import torch
from diffusers.loaders import lora_conversion_utils
from safetensors.numpy import save_file

from shortcut_jax.errors import ConversionError
from shortcut_jax.sources import models
from shortcut_jax.sources.models import holds_lora, open_lora, open_models
from shortcut_jax.weights.lora_files import to_kohya, to_peft
from tests.weights.lora_cases import CFG, random_modules
from tests.weights.test_lora_files import _same

PEFT = {
    "PEFT around diffusers": lambda n: n.replace("transformer.", "transformer.base_model.model.", 1),
    "diffusers of old": lambda n: n.replace("transformer.", "unet.", 1),
    "data parallel": lambda n: n.replace("transformer.", "module.", 1),
    "data parallel around PEFT": lambda n: n.replace("transformer.", "module.base_model.model.", 1),
    "compiled": lambda n: n.replace("transformer.", "base_model.model._orig_mod.", 1),
    "compiled blocks": lambda n: n.replace("transformer_blocks.0.", "transformer_blocks.0._orig_mod."),
    "FSDP": lambda n: n.replace("transformer.", "_fsdp_wrapped_module.", 1).replace(".0.", ".0._fsdp_wrapped_module."),
    "checkpointed": lambda n: n.replace(".1.", ".1._checkpoint_wrapped_module."),
    "PEFT's model, not its file": lambda n: n.replace("transformer.", "base_model.model.", 1).replace(
        ".weight", ".default.weight"
    ),
    "another adapter name": lambda n: n.replace(".weight", ".my-style_1.weight"),
    "ComfyUI around diffusers": lambda n: n.replace("transformer.", "diffusion_model.", 1),
}
KOHYA = {
    "two underscores": lambda n: n.replace("lora_unet_", "lora_unet__"),
    "underscore at the end": lambda n: n.replace(".", "_.", 1),
    "compiled": lambda n: n.replace("lora_unet_", "lora_unet__orig_mod_"),
    "compiled blocks": lambda n: n.replace("_blocks_0_", "_blocks_0__orig_mod_"),
    "LyCORIS": lambda n: n.replace("lora_unet_", "lycoris_"),
}


@pytest.fixture(autouse=True)
def known_shapes(shapes, monkeypatch):
    """Those of the base, which take a second to trace."""
    monkeypatch.setattr(models, "param_shapes", lambda kind, config: shapes)


def _file(folder, tensors, metadata=None, name="lora.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / name, metadata)
    return folder / name


@pytest.mark.parametrize("name", PEFT)
def test_peft_names_are_read_whatever_stands_before_them(name, shapes, tmp_path):
    modules = random_modules(shapes)
    tensors = {PEFT[name](k): v for k, v in to_peft(modules)[0].items()}
    assert tensors.keys() != to_peft(modules)[0].keys()
    file = _file(tmp_path, tensors)
    assert holds_lora(file)
    _same(open_lora(file, CFG)[0], modules)


@pytest.mark.parametrize("name", KOHYA)
def test_kohya_names_are_read_whatever_stands_around_them(name, shapes, tmp_path):
    modules = random_modules(shapes)
    own, _ = to_kohya(modules, shapes)
    tensors = {KOHYA[name](k): v for k, v in own.items()}
    assert tensors.keys() != own.keys()
    _same(open_lora(_file(tmp_path, tensors), CFG)[0], open_lora(_file(tmp_path, own, name="own.safetensors"), CFG)[0])


def test_several_adapters_in_one_file_are_named(shapes, tmp_path):
    tensors, _ = to_peft(random_modules(shapes, keep=lambda n: n == "proj_out"))
    both = {k.replace(".weight", f".{name}.weight"): v for k, v in tensors.items() for name in ("red", "blue")}
    with pytest.raises(ConversionError, match="the file has several adapters, 'blue' and 'red': save each to a file"):
        open_lora(_file(tmp_path, both), CFG)


def test_text_encoders_and_embeddings_beside_a_good_lora_are_left_out(shapes, tmp_path):
    modules = random_modules(shapes, keep=lambda n: n == "proj_out")
    text = (
        *("clip_l.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "t5xxl.encoder.block.0.lora_A.weight"),
        *("text_encoders.clip_l.transformer.text_model.lora_A.weight", "lora_te1_text_model_x.lora_down.weight"),
        *("text_encoder.text_model.lora_A.weight", "base_model.model.text_model.x.lora_A.weight"),
        *("lora_te3_x.alpha", "clip_l.text_model.x.lokr_w1"),
    )
    words = ("bundle_emb.my_token.clip_l", "bundle_emb.my_token.t5xxl", "emb_params")
    others = {name: np.ones((2, 3), "f") for name in (*text, *words)}
    others["lora_unet_img_in.diff_b"] = np.zeros(3, "f")
    read, notes = open_lora(_file(tmp_path, to_peft(modules)[0] | others), CFG)
    _same(read, modules)
    assert f"{len(text)} tensors of text encoder adapters are left out: only the transformer's are used" in notes
    assert any(
        note.startswith("3 tensors of embeddings (bundle_emb.my_token.clip_l, ...) are left out") for note in notes
    )
    assert "1 differences of whole weights are left out: they are zero" in notes


def _xlabs(shapes, prefix=""):
    """XLabs' modules of every block, each with factors of its own; D = 32, the MLP is 128 wide."""
    rng = np.random.default_rng(5)
    sizes = {f"{s}_blocks.{i}.processor.{n}": width for s, names in XLABS.items() for n, width in names for i in (0, 1)}
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    vae_codec = {n: (draw(4, inputs), draw(outputs, 4)) for n, (inputs, outputs) in sizes.items()}
    return {
        f"{prefix}{n}.{h}.weight": x for n, both in vae_codec.items() for h, x in zip(("down", "up"), both, strict=True)
    }


XLABS = {
    "double": [("qkv_lora1", (32, 96)), ("qkv_lora2", (32, 96)), ("proj_lora1", (32, 32)), ("proj_lora2", (32, 32))],
    "single": [("qkv_lora", (32, 96)), ("proj_lora", (160, 32))],
}


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs_files_are_those_that_diffusers_converts(prefix, shapes, tmp_path):
    tensors = _xlabs(shapes, prefix)
    modules, notes = open_lora(_file(tmp_path, tensors), CFG)
    theirs = lora_conversion_utils._convert_xlabs_flux_lora_to_diffusers(
        {k: torch.from_numpy(v) for k, v in tensors.items()}
    )
    assert theirs.keys() == {f"transformer.{m}.lora_{half}.weight" for m in modules for half in "AB"}
    for module, f in modules.items():
        assert f.scale == 1.0
        np.testing.assert_array_equal(f.down, theirs[f"transformer.{module}.lora_A.weight"].numpy())
        np.testing.assert_array_equal(f.up, theirs[f"transformer.{module}.lora_B.weight"].numpy())
    assert len(modules) == 2 * 8 + 2 * 4
    assert notes == ("alpha: the rank of each module, for the file does not say",)


Q = "transformer.transformer_blocks.0.attn.to_q"
FOREIGN = {
    "lora_unet_double_blocks_0_img_attn_qkv.lokr_w1": r"a LoKr \(LyCORIS\); merge it into its base with the program",
    "base_model.model.transformer_blocks.0.attn.to_q.lokr_w2_a": r"a LoKr",
    "lora_unet_img_in.hada_w1_a": r"a LoHa \(LyCORIS\)",
    f"{Q}.ia3_l": r"\(IA\)\^3",
    "lora_unet_img_in.on_input": r"\(IA\)\^3",
    "lora_unet_img_in.oft_blocks": "OFT or BOFT",
    f"{Q}.boft_R": "OFT or BOFT",
    "lora_unet_img_in.a1.weight": "a GLoRA",
    "lora_unet_img_in.dora_scale": "DoRA",
    f"{Q}.lora_magnitude_vector.weight": "DoRA",
    "lora_unet_img_in.lora_mid.weight": "a LoRA with Tucker factors",
    f"{Q}.lora_E": "an AdaLoRA",
    f"{Q}.lora_B.bias": "biases beside the factors",
    "lora_unet_img_in.diff": "differences of whole weights or biases",
    "double_blocks.0.img_attn.norm.query_norm.scale": r"a control LoRA .*Canny or Depth",
    "transformer.transformer_blocks.0.attn.norm_added_q.weight": r"a control LoRA .*Canny or Depth",
    "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": "XLabs' IP-Adapter",
    "lora_unet_distilled_guidance_layer_in_proj.lora_down.weight": "this is Chroma, another model than FLUX.1",
    "transformer_blocks.0.qkv_proj.lora_down": r"this is SVDQuant \(nunchaku\), which is quantised to 4 bits",
    "diffusion_model.double_stream_modulation_img.lin.lora_A.weight": r"this is FLUX\.2",
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("beside", [True, False], ids=["beside a LoRA", "alone"])
def test_other_kinds_of_adapters_are_refused_by_their_names(name, beside, shapes, tmp_path):
    plain = to_peft(random_modules(shapes, keep=lambda n: n == "proj_out"))[0] if beside else {}
    file = _file(tmp_path, plain | {name: np.ones((2, 3), "f")})
    with pytest.raises(ConversionError, match=FOREIGN[name]):
        open_lora(file, CFG)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.lokr_w1", "a LoKr"),
        ("distilled_guidance_layer.in_proj.weight", "this is Chroma"),
        ("transformer_blocks.0.qkv_proj.qweight", "this is SVDQuant"),
        ("transformer.resblocks.0.attn.in_proj_weight", r"CLIP by OpenAI's .*openai/clip-vit-large-patch14"),
        (f"{Q}.lora_A.weight", r"these are adapters \(a LoRA\), not a model: name them by --lora"),
    ],
)
def test_what_is_no_model_is_refused_by_its_name_where_a_model_is_wanted(name, message, tmp_path):
    with pytest.raises(ConversionError, match=message):
        open_models(_file(tmp_path, {name: np.ones((2, 3), "f")}))


@pytest.mark.parametrize(("times", "kind"), [(2, "a control LoRA of FLUX.1 Canny or Depth"), (6, "FLUX.1 Fill")])
@pytest.mark.parametrize("names", [to_peft, to_kohya])
def test_an_expanded_image_input_is_a_relative(times, kind, names, shapes, tmp_path):
    (name, f), *_ = random_modules(shapes, keep=lambda n: n == "x_embedder").items()
    wide = {name: f._replace(down=np.ones((3, 4 * times), "f"))}
    tensors, _ = names(wide) if names is to_peft else names(wide, shapes)
    with pytest.raises(ConversionError, match=f"{kind}.* is {times} times as wide"):
        open_lora(_file(tmp_path, tensors), CFG)


def test_the_header_names_chroma_and_split_qkv(shapes, tmp_path):
    tensors, _ = to_kohya(random_modules(shapes), shapes)
    for arguments, said in (({"split_qkv": "True"}, 1), ({"split_qkv": "False"}, 0), ({}, 0), ([], 0)):
        file = _file(tmp_path, tensors, {"ss_network_args": json.dumps(arguments)})
        modules, notes = open_lora(file, CFG)
        assert sum("with split_qkv (the file's header says so)" in note for note in notes) == said
        # As diffusers' conversion: alpha over the rank of the file, whatever the parts.
        assert modules["transformer_blocks.0.attn.to_q"].scale == 1.0
    assert len(open_lora(_file(tmp_path, tensors, {"ss_network_args": "{"}), CFG)[0]) == len(modules)
    for name in ("modelspec.architecture", "ss_base_model_version"):
        with pytest.raises(ConversionError, match="an adapter of Chroma"):
            open_lora(_file(tmp_path, tensors, {name: "Chroma/lora"}), CFG)
