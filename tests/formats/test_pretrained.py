import json

import numpy as np
import pytest

from shortcut_jax import cli, convert
from shortcut_jax.errors import ConversionError, SafetensorsError
from shortcut_jax.formats.pretrained import open_pretrained
from shortcut_jax.formats.safetensors import choose_files
from shortcut_jax.sources.models import open_models
from shortcut_jax.weights import flux_bfl, flux_diffusers
from tests.formats.conftest import AXES, save
from tests.helpers import to_flax, to_torch


def _opened_equals(path, params, kind="flux"):
    (model,) = open_pretrained(path)
    assert model.found.kind == kind and model.notes == ()
    back = to_flax(model.tensors, model.found.rules, {k: v.shape for k, v in params.items()})
    assert all(np.array_equal(back[k], params[k]) for k in params)


def test_a_comfy_file_and_a_sharded_folder_hold_the_same_model(tmp_path, params):
    (tmp_path / "config.json").write_text(json.dumps(AXES))
    comfy = {f"model.diffusion_model.{k}": v for k, v in to_torch(params, flux_bfl.RULES).items()}
    save(tmp_path / "comfy.safetensors", comfy)
    _opened_equals(tmp_path / "comfy.safetensors", params)

    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(AXES))
    tensors = to_torch(params, flux_diffusers.RULES)
    names = sorted(tensors)
    files = {"m-1.safetensors": names[::2], "m-2.safetensors": names[1::2]}
    for file, part in files.items():
        save(folder / file, {n: tensors[n] for n in part})
    index = {"weight_map": {n: file for file, part in files.items() for n in part}}
    (folder / "m.safetensors.index.json").write_text(json.dumps(index))
    _opened_equals(folder, params)
    _opened_equals(folder / "m.safetensors.index.json", params)
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    _opened_equals(tmp_path / "pipeline", params)


def test_what_is_refused_is_named_with_the_way_out(tmp_path):
    for name, error, message in (
        ("flux.gguf", ConversionError, "is GGUF, which is quantised"),
        (
            "flux.ckpt",
            ConversionError,
            r'is a pickle.*torch.load\("flux.ckpt", .*weights_only=True\)',
        ),
        ("flux.txt", SafetensorsError, "cut off or not a safetensors file"),
    ):
        (tmp_path / name).write_bytes(b"x" * 100)
        with pytest.raises(error, match=message):
            open_pretrained(tmp_path / name)
    with pytest.raises(SafetensorsError, match="nowhere is not found"):
        open_pretrained(tmp_path / "nowhere")
    save(tmp_path / "nf4.safetensors", {"a.weight.quant_state.bitsandbytes__nf4": np.zeros(3, np.uint8)})
    with pytest.raises(ConversionError, match="quantised to NF4"):
        open_pretrained(tmp_path / "nf4.safetensors")


def test_relatives_with_the_shapes_of_flux_are_refused_by_name(tmp_path, params):
    tensors = to_torch(params, flux_bfl.RULES)
    save(tmp_path / "flux1-kontext-dev.safetensors", tensors)
    with pytest.raises(ConversionError, match=r"flux1-kontext-dev\.safetensors is FLUX\.1 Kontext"):
        open_pretrained(tmp_path / "flux1-kontext-dev.safetensors")
    for name, message in (("Kontext", "Kontext"), ("Fill", "Fill"), ("Control", "Canny")):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": f"Flux{name}Pipeline"}))
        with pytest.raises(ConversionError, match=rf"Flux{name}Pipeline is FLUX\.1 {message}"):
            open_pretrained(tmp_path)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(AXES))
    save(tmp_path / "transformer" / "m.safetensors", to_torch(params, flux_diffusers.RULES))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxKontextPipeline"}))
    with pytest.raises(ConversionError, match="Kontext"):
        open_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxControlNetPipeline"}))
    assert open_pretrained(tmp_path)[0].found.kind == "flux"


def test_a_pipeline_folder_has_everything_that_its_index_names(tmp_path, params):
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(AXES))
    save(tmp_path / "transformer" / "m.safetensors", to_torch(params, flux_diffusers.RULES))
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "vae": [None, None]}))
    assert len(open_pretrained(tmp_path)) == 1
    absent = {"text_encoder_2": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    (tmp_path / "model_index.json").write_text(json.dumps({**index, **absent}))
    with pytest.raises(ConversionError, match="names text_encoder_2, tokenizer, which is not found"):
        open_pretrained(tmp_path)


def test_two_embeddings_of_t5_have_to_be_one(tmp_path):
    from tests.weights.test_text import T5, _t5, _weights

    weights = _weights(_t5())
    table = "encoder.embed_tokens.weight"
    weights = {k: v for k, v in weights.items() if k != table}
    for twin, fine in ((weights["shared.weight"], True), (weights["shared.weight"] + 1, False)):
        save(tmp_path / "t5.safetensors", {**weights, table: twin})
        if fine:
            (model,) = open_pretrained(tmp_path / "t5.safetensors")
            assert model.found.config.width == T5.width and "left out: encoder.embed_tokens" in model.notes[0]
        else:
            with pytest.raises(ConversionError, match="should be one table, but differ"):
                open_pretrained(tmp_path / "t5.safetensors")


@pytest.mark.parametrize("name", ["t5", "odd $(name)"])
def test_the_line_that_is_printed_for_pickles_works_also_where_tensors_share_memory(tmp_path, capfd, name):
    import subprocess

    import torch
    from safetensors.torch import load_file

    table = torch.arange(12.0).reshape(3, 4)
    torch.save({"shared.weight": table, "tied.weight": table, "turned": table.T}, tmp_path / f"{name}.pt")
    with pytest.raises(SystemExit):
        cli.run(convert.main, ["convert", f"--from={tmp_path}/{name}.pt", f"--to={tmp_path}/x"])
    (printed,) = [line for line in capfd.readouterr().err.splitlines() if "is a pickle" in line]
    subprocess.run(printed.split("in its folder: ")[1], shell=True, check=True, cwd=tmp_path)
    saved = load_file(tmp_path / f"{name}.safetensors")
    assert torch.equal(saved["shared.weight"], table) and torch.equal(saved["tied.weight"], table)
    assert torch.equal(saved["turned"], table.T)


@pytest.mark.parametrize("rules", [flux_bfl.RULES, flux_diffusers.RULES], ids=["bfl", "diffusers"])
def test_a_stray_block_is_left_over_and_an_absent_one_is_missing(tmp_path, params, rules):
    (tmp_path / "config.json").write_text(json.dumps(AXES))
    params = {k: np.concatenate([v] * 3) if "_blocks/" in k else v for k, v in params.items()}
    tensors = to_torch(params, rules)
    stack = "double_blocks" if rules is flux_bfl.RULES else "transformer_blocks"
    name = "attn.to_q.weight" if rules is flux_diffusers.RULES else "img_attn.qkv.weight"
    name, value = f"{stack}.0.{name}", tensors[f"{stack}.0.{name}"]
    for number in (99, 6):
        stray = name.replace(".0.", f".{number}.", 1)
        save(tmp_path / "x.safetensors", {**tensors, stray: value})
        with pytest.raises(ConversionError) as error:
            open_models(tmp_path / "x.safetensors")
        assert str(error.value).startswith(f"in the checkpoint, but not in this model: {stray} (nearest known name")
        assert name.split(".", 2)[2] in str(error.value).split("nearest")[1]
    save(tmp_path / "x.safetensors", {n: v for n, v in tensors.items() if not n.startswith(f"{stack}.1.")})
    with pytest.raises(ConversionError, match=rf"^missing from the checkpoint: {stack}\.1\..* and \d+ more"):
        open_models(tmp_path / "x.safetensors")


def test_names_outside_the_models_of_a_file_are_refused_unless_known_to_be_of_no_use(tmp_path, params):
    (tmp_path / "config.json").write_text(json.dumps(AXES))
    tensors = {f"model.diffusion_model.{k}": v for k, v in to_torch(params, flux_bfl.RULES).items()}
    unused = {"clip_l.logit_scale": np.ones((), "f"), "clip_l.text_projection.weight": np.ones((2, 2), "f")}
    save(tmp_path / "x.safetensors", {**tensors, **unused})
    (model,) = open_pretrained(tmp_path / "x.safetensors")
    assert model.notes == (
        "left out: clip_l.logit_scale (CLIP's temperature, which is not used here; ComfyUI writes one for T5 too)",
        "left out: clip_l.text_projection.weight (CLIP's projection, which Flux does not use)",
    )
    save(tmp_path / "x.safetensors", {**tensors, **unused, "model.difusion_model.img_in.bias": np.ones(3, "f")})
    message = (
        r"^in the checkpoint, but in none of its models: model\.difusion_model\.img_in\.bias "
        r"\(nearest known name for the first: model\.diffusion_model\.img_in\.bias\)$"
    )
    with pytest.raises(ConversionError, match=message):
        open_pretrained(tmp_path / "x.safetensors")
    save(tmp_path / "x.safetensors", {**tensors, "x.encoder.embed_tokens.weight": np.ones((2, 2), "f")})
    with pytest.raises(ConversionError, match=r"in none of its models: x\.encoder\.embed_tokens\.weight"):
        open_pretrained(tmp_path / "x.safetensors")


def test_missing_last_blocks_are_seen_by_the_config_beside_them(tmp_path, params):
    tensors = to_torch(params, flux_diffusers.RULES)
    last = {n for n in tensors if n.startswith("single_transformer_blocks.1.")}
    save(tmp_path / "x.safetensors", {n: v for n, v in tensors.items() if n not in last})
    (tmp_path / "config.json").write_text(json.dumps({**AXES, "num_single_layers": 2}))
    with pytest.raises(ConversionError, match="says num_single_layers 2, but the checkpoint holds 1: it is incomplete"):
        open_models(tmp_path)


def test_a_config_that_is_not_utf_8_is_one_clear_line(tmp_path, params):
    save(tmp_path / "x.safetensors", to_torch(params, flux_bfl.RULES))
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(ConversionError, match=r"config\.json is not JSON"):
        open_models(tmp_path / "x.safetensors")


def test_a_whole_clip_is_one_model_that_keeps_its_projections(tmp_path):
    from tests.weights.test_text import PAIR, _weights, clip_pair

    weights = _weights(clip_pair(PAIR))
    buffers = {f"{tower}_model.embeddings.position_ids": np.arange(20)[None] for tower in ("text", "vision")}
    save(tmp_path / "model.safetensors", {**weights, **buffers})
    (tmp_path / "config.json").write_text(
        json.dumps({"text_config": {"num_attention_heads": 4}, "vision_config": {"num_attention_heads": 4}})
    )
    (model,) = open_models(tmp_path)
    assert (model.kind, model.config) == ("clip_score", PAIR)
    assert [note.split()[2] for note in model.notes] == ["logit_scale", *sorted(buffers)]
    projected = [name for name in model.params if name.endswith("projection/kernel")]
    assert projected == ["image_projection/kernel", "text_projection/kernel"]


def _layout(folder, names, index=None):
    """A folder of files with one tensor each, named after the file; an index names all of them."""
    folder.mkdir()
    for name in names:
        save(folder / name, {name: np.zeros(1, np.float32)})
    if index:
        (folder / index).write_text(json.dumps({"weight_map": {name: name for name in names}}))


def _also(folder, names, index=None):
    other = folder.with_name("other")
    _layout(other, names, index)
    for file in other.iterdir():
        file.rename(folder / file.name)
    other.rmdir()


ONE = ["diffusion_pytorch_model.safetensors"]
HALF = ["diffusion_pytorch_model.fp16.safetensors"]
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
HALF_SHARDS = [f"model-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)]
OLD_HALF_SHARDS = [f"model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
INDEX, HALF_INDEX = "model.safetensors.index.json", "model.safetensors.index.fp16.json"


@pytest.mark.parametrize(
    ("full", "index", "variant", "variant_index"),
    [
        (ONE, None, HALF, None),
        (["model.safetensors"], None, ["model.fp16.safetensors", "model.bf16.safetensors"], None),
        (["model.safetensors"], None, HALF_SHARDS, HALF_INDEX),
        (SHARDS, INDEX, ["model.fp16.safetensors"], None),
        (SHARDS, INDEX, HALF_SHARDS, HALF_INDEX),
        (SHARDS, INDEX, OLD_HALF_SHARDS, HALF_INDEX),
        (SHARDS, None, OLD_HALF_SHARDS, None),
    ],
)
def test_the_full_model_is_read_where_a_variant_lies_beside_it(full, index, variant, variant_index, tmp_path):
    folder = tmp_path / "in"
    _layout(folder, full, index)
    assert choose_files(folder) == ([folder / name for name in full], [])
    _also(folder, variant, variant_index)
    assert choose_files(folder) == ([folder / name for name in full], sorted(variant))


@pytest.mark.parametrize(
    ("variant", "index"), [(HALF, None), (HALF_SHARDS, HALF_INDEX), (HALF_SHARDS, None), (OLD_HALF_SHARDS, HALF_INDEX)]
)
def test_a_variant_that_is_alone_is_read(variant, index, tmp_path):
    folder = tmp_path / "in"
    _layout(folder, variant, index)
    assert choose_files(folder) == ([folder / name for name in variant], [])
    if index:
        assert choose_files(folder / index) == ([folder / name for name in variant], [])
    if len(variant) > 1:
        (folder / variant[0]).unlink()
        with pytest.raises(SafetensorsError, match="00001-of-00002"):
            choose_files(folder)


def test_files_that_are_no_variants_are_read_together(tmp_path):
    names = ["ae.safetensors", "clip.l.safetensors", "flux1-dev.safetensors"]
    _layout(tmp_path / "in", names)
    assert choose_files(tmp_path / "in") == ([tmp_path / "in" / name for name in names], [])


def test_a_variant_beside_the_full_file_of_a_pipeline_is_told(tmp_path, params):
    tensors = to_torch(params, flux_diffusers.RULES)
    (tmp_path / "config.json").write_text(json.dumps(AXES))
    save(tmp_path / ONE[0], tensors)
    save(tmp_path / HALF[0], {k: np.full_like(v, np.nan).astype(np.float16) for k, v in tensors.items()})
    (model,) = open_pretrained(tmp_path)
    assert f"not read: {HALF[0]}, for {ONE[0]} in the same folder is the full model" in model.notes
    np.testing.assert_array_equal(model.tensors["x_embedder.bias"], tensors["x_embedder.bias"])
    (tmp_path / ONE[0]).unlink()
    (half,) = open_pretrained(tmp_path)
    assert half.tensors.spec("x_embedder.bias").dtype == np.float16 and not any("not read" in n for n in half.notes)
