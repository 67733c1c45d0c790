import re

import pytest

from shortcut_jax.errors import ConversionError
from shortcut_jax.formats.detect import identify
from shortcut_jax.models.clip import ClipConfig, ClipPairConfig
from shortcut_jax.models.inception import InceptionConfig
from shortcut_jax.models.presets import preset
from shortcut_jax.models.t5 import T5Config
from shortcut_jax.models.vae import VaeConfig
from shortcut_jax.sources.models import param_shapes
from shortcut_jax.weights import flux_bfl, flux_diffusers, inception
from shortcut_jax.weights.rules import torch_shapes
from shortcut_jax.weights.text import CLIP_PAIR_RULES, CLIP_RULES, T5_RULES
from shortcut_jax.weights.vae import bfl_rules, diffusers_rules
from tests.weights.test_full_size import _flux

CONFIGS = {
    "vae": VaeConfig(),
    "t5": T5Config(),
    "clip": ClipConfig(),
    "clip_score": ClipPairConfig(),
    "inception": InceptionConfig(),
}
TABLES = {
    "bfl": flux_bfl.RULES,
    "diffusers": flux_diffusers.RULES,
    "vae-bfl": bfl_rules(4, 2),
    "vae-diffusers": diffusers_rules(4, 2),
    "t5": T5_RULES,
    "clip": CLIP_RULES,
    "clip_score": CLIP_PAIR_RULES,
    "inception": inception.RULES,
}


def _theirs(kind, table):
    if kind.startswith("flux"):
        return torch_shapes(_flux(kind), TABLES[table])
    return torch_shapes(param_shapes(kind, CONFIGS[kind]), TABLES[table])


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell", "flux-600m", "flux-30m"])
@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_a_transformer_is_known_by_its_names_and_its_geometry_by_its_shapes(name, layout):
    (found,) = identify(_theirs(name, layout))
    assert (found.kind, found.layout, found.prefix, found.rules) == ("flux", layout, "", TABLES[layout])
    assert found.config == preset(name)


@pytest.mark.parametrize("table", ["vae-bfl", "vae-diffusers", "t5", "clip", "clip_score", "inception"])
def test_encoders_are_known_with_the_geometry_of_their_release(table):
    kind = table.split("-")[0]
    (found,) = identify(_theirs(kind, table))
    assert found.kind == kind and found.config == CONFIGS[kind]
    # Transforms are made anew for each table: names tell.
    names = lambda rules: [(rule.sources, rule.targets) for rule in rules]
    assert names(found.rules) == names(TABLES[table])


def test_prefixes_and_several_models_in_one_file():
    parts = {
        "model.diffusion_model.": _theirs("flux-dev", "bfl"),
        "vae.": _theirs("vae", "vae-bfl"),
        "text_encoders.t5xxl.transformer.": _theirs("t5", "t5"),
        "text_encoders.clip_l.transformer.": _theirs("clip", "clip"),
    }
    joined = {f"{prefix}{name}": shape for prefix, names in parts.items() for name, shape in names.items()}
    found = identify(joined)
    assert [(f.kind, f.prefix) for f in found] == list(zip(("flux", "vae", "t5", "clip"), parts, strict=True))
    assert found[0].config == preset("flux-dev")
    assert "Flux transformer with guidance, 19 + 38 blocks of width 3072" in str(found[0])


def test_a_config_tells_what_shapes_cannot():
    shapes = torch_shapes(_flux("tiny"), flux_diffusers.RULES)
    with pytest.raises(ConversionError, match="rotary axes of head size 16 are not known"):
        identify(shapes)
    assert identify(shapes, {"axes_dims_rope": [4, 6, 6]})[0].config == preset("tiny")
    assert identify(_theirs("clip", "clip"), {"eos_token_id": 49407})[0].config.end_token == 49407


def test_relatives_and_strangers_are_named():
    for channels, name in ((384, "Fill"), (128, "Canny or Depth")):
        shapes = _theirs("flux-dev", "bfl") | {"img_in.weight": (3072, channels)}
        with pytest.raises(ConversionError, match=name):
            identify(shapes)
    with pytest.raises(ConversionError, match=re.escape("it holds model.layers.0.weight")):
        identify({"model.layers.0.weight": (3, 3)})
    with pytest.raises(ConversionError, match="it holds nothing"):
        identify({})


def test_what_a_geometry_is_read_from_is_named_where_it_is_missing_or_misshapen():
    for table, kind, name, message in (
        ("bfl", "flux-dev", "img_in.weight", "missing from the checkpoint: img_in.weight"),
        ("bfl", "flux-dev", "vector_in.in_layer.weight", "missing from the checkpoint: vector_in.in_layer.weight"),
        ("diffusers", "flux-dev", "context_embedder.weight", "missing from the checkpoint: context_embedder.weight"),
        ("vae-bfl", "vae", "encoder.conv_in.weight", "missing from the checkpoint: encoder.conv_in.weight"),
        ("t5", "t5", "shared.weight", "missing from the checkpoint: shared.weight"),
        ("clip", "clip", "text_model.embeddings.position_embedding.weight", "missing from the checkpoint: text_model"),
        ("clip_score", "clip_score", "visual_projection.weight", "missing from the checkpoint: visual_projection"),
        ("inception", "inception", "fc.weight", "missing from the checkpoint: fc.weight"),
    ):
        shapes = _theirs(kind, table)
        without = {k: v for k, v in shapes.items() if k != name}
        with pytest.raises(ConversionError, match=re.escape(message)):
            identify(without)
        with pytest.raises(ConversionError, match=re.escape(f"{name} has shape (5, 5, 5), but should have")):
            identify({**shapes, name: (5, 5, 5)})
    strange = {**_theirs("flux-dev", "bfl"), "single_blocks.x.weight": (1,)}
    assert identify(strange)[0].config == preset("flux-dev")  # the table then names what is left over


def test_two_models_of_a_kind_and_configs_of_another_function_are_refused():
    twice = _theirs("flux-30m", "bfl")
    twice = {f"{p}{k}": v for p in ("model_ema.", "model.diffusion_model.") for k, v in twice.items()}
    with pytest.raises(ConversionError, match=r"under model\.diffusion_model\., model_ema\."):
        identify(twice)
    for table, name, value in (
        ("clip", "hidden_act", "gelu"),
        ("clip", "layer_norm_eps", 1e-6),
        ("t5", "feed_forward_proj", "relu"),
        ("t5", "layer_norm_epsilon", 1e-5),
    ):
        with pytest.raises(ConversionError, match=f"config.json says {name} {value!r}"):
            identify(_theirs(table, table), {name: value})
    with pytest.raises(ConversionError, match="name num_attention_heads"):
        identify(_theirs("clip", "clip"), {"num_attention_heads": 7})


def test_the_name_a_model_is_known_by_and_further_inputs_are_named():
    for table, kind, sign in (
        ("bfl", "flux-dev", "double_blocks.0.img_attn.qkv.weight"),
        ("diffusers", "flux-dev", "transformer_blocks.0.attn.add_q_proj.weight"),
        ("vae-bfl", "vae", "encoder.mid.attn_1.q.weight"),
        ("vae-diffusers", "vae", "encoder.mid_block.attentions.0.to_q.weight"),
        ("t5", "t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        ("clip", "clip", "text_model.embeddings.token_embedding.weight"),
        ("inception", "inception", "Mixed_5b.branch1x1.conv.weight"),
    ):
        shapes = {f"prefix.{k}": v for k, v in _theirs(kind, table).items() if k != sign}
        with pytest.raises(ConversionError, match=re.escape(f"missing from the checkpoint: {sign} (nearest")):
            identify(shapes)
    for channels in (96, 192, 320):
        with pytest.raises(ConversionError, match=f"reads {channels} channels, but the model gives 64"):
            identify(_theirs("flux-dev", "bfl") | {"img_in.weight": (3072, channels)})


@pytest.mark.parametrize(
    ("kind", "table", "right", "wrong"),
    [
        ("flux-dev", "diffusers", {"num_layers": 19}, {"num_layers": 20}),
        ("flux-dev", "diffusers", {"num_single_layers": 38}, {"num_single_layers": 39}),
        ("flux-dev", "diffusers", {"guidance_embeds": True}, {"guidance_embeds": False}),
        ("flux-schnell", "bfl", {"guidance_embeds": False}, {"guidance_embeds": True}),
        ("flux-dev", "bfl", {"num_attention_heads": 24}, {"num_attention_heads": 12}),
        ("flux-dev", "bfl", {"attention_head_dim": 128}, {"attention_head_dim": 64}),
        ("flux-dev", "bfl", {"in_channels": 64}, {"in_channels": 16}),
        ("clip", "clip", {"num_hidden_layers": 12}, {"num_hidden_layers": 13}),
        ("t5", "t5", {"num_layers": 24}, {"num_layers": 25}),
        ("t5", "t5", {"num_heads": 64}, {"num_heads": 32}),
        ("t5", "t5", {"d_kv": 64}, {"d_kv": 128}),
        ("vae", "vae-bfl", {"block_out_channels": [128, 256, 512, 512]}, {"block_out_channels": [128, 256, 512]}),
        ("vae", "vae-diffusers", {"layers_per_block": 2}, {"layers_per_block": 3}),
    ],
)
def test_a_config_that_says_more_or_less_than_is_there_is_refused(kind, table, right, wrong):
    shapes = _theirs(kind, table)
    assert identify(shapes, right) == identify(shapes) or table.startswith("vae")
    ((name, value),) = wrong.items()
    value = tuple(value) if isinstance(value, list) else value
    with pytest.raises(
        ConversionError, match=re.escape(f"config.json says {name} {value!r}, but the checkpoint holds")
    ):
        identify(shapes, wrong)


def test_the_config_of_a_whole_clip_tells_of_each_tower():
    shapes = _theirs("clip_score", "clip_score")
    towers = {
        "text_config": {"num_hidden_layers": 12, "eos_token_id": 49407},
        "vision_config": {"num_hidden_layers": 24, "num_attention_heads": 8},
    }
    config = identify(shapes, {"model_type": "clip", "projection_dim": 768, **towers})[0].config
    assert (config.end_token, config.image_heads, config.text_heads) == (49407, 8, 12)
    for hints, message in (
        (
            {"vision_config": {"num_hidden_layers": 25}},
            "says num_hidden_layers 25 of vision_config, but the checkpoint",
        ),
        ({"text_config": {"num_hidden_layers": 11}}, "says num_hidden_layers 11 of text_config, but the checkpoint"),
        ({"vision_config": {"hidden_act": "gelu"}}, "says hidden_act 'gelu', but only 'quick_gelu' is supported"),
        ({"projection_dim": 512}, "says projection_dim 512, but the checkpoint holds 768"),
        ({"text_config": [1]}, "text_config and vision_config in config.json are not both JSON objects"),
    ):
        with pytest.raises(ConversionError, match=re.escape(message)):
            identify(shapes, hints)


def test_the_config_of_a_neighbour_and_names_of_two_models_tell_nothing():
    flux = {"_class_name": "FluxTransformer2DModel", "num_layers": 19}
    assert identify(_theirs("t5", "t5"), flux)[0].config == T5Config()
    both = {f"a.{k}": v for k, v in _theirs("flux-dev", "bfl").items()} | {
        f"b.{k}": v for k, v in _theirs("t5", "t5").items()
    }
    assert len(identify(both, {"num_layers": 19})) == 2
    with pytest.raises(ConversionError, match="num_single_layers 39"):
        identify(both, {"num_layers": 19, "num_single_layers": 39})


@pytest.mark.parametrize(
    ("kind", "table", "hints", "message"),
    [
        ("flux-dev", "bfl", {"axes_dims_rope": 5}, "axes_dims_rope 5, which is not a list of whole numbers"),
        ("flux-dev", "bfl", {"axes_dims_rope": "abc"}, "axes_dims_rope 'abc', which is not a list"),
        ("flux-dev", "bfl", {"axes_dims_rope": ["a", 6, 6]}, "which is not a list of whole numbers"),
        ("flux-dev", "bfl", {"axes_dims_rope": [15, 56, 57]}, "(15, 56, 57) do not fit it (even numbers"),
        ("flux-dev", "bfl", {"guidance_embeds": "yes"}, "guidance_embeds 'yes', which is not true or false"),
        ("vae", "vae-bfl", {"norm_num_groups": "8"}, "norm_num_groups '8', which is not a whole number"),
        ("vae", "vae-bfl", {"norm_num_groups": 7}, "7 groups of norms do not divide the widths (128, 256, 512, 512)"),
        ("vae", "vae-bfl", {"scaling_factor": "x"}, "scaling_factor 'x', which is not a number"),
        ("clip", "clip", {"eos_token_id": [1]}, "eos_token_id [1], which is not a whole number"),
        ("clip", "clip", {"num_attention_heads": "8"}, "num_attention_heads '8', which is not a whole number"),
    ],
)
def test_an_entry_of_another_kind_is_named(kind, table, hints, message):
    with pytest.raises(ConversionError, match=re.escape(message)):
        identify(_theirs(kind, table), hints)


def test_a_width_that_heads_do_not_divide_is_named():
    norms = {k: (100,) for k in _theirs("flux-dev", "bfl") if k.endswith("query_norm.scale")}
    with pytest.raises(ConversionError, match=r"the width 3072 of img_in\.weight is no multiple of the head size 100"):
        identify({**_theirs("flux-dev", "bfl"), **norms}, {"axes_dims_rope": [20, 40, 40]})
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    with pytest.raises(ConversionError, match="do not divide into 63 heads"):
        identify({**_theirs("t5", "t5"), bias: (32, 63)})
