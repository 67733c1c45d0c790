"""Every name and shape of the released models, without their memory: the reference is built on torch's meta device."""

import jax
import numpy as np
import pytest

from shortcut_jax.core.tree import flat_paths
from shortcut_jax.models.clip import ClipConfig, ClipPairConfig, ClipText
from shortcut_jax.models.init import init_params
from shortcut_jax.models.presets import preset
from shortcut_jax.models.t5 import T5Config, T5Encoder
from shortcut_jax.models.vae import Autoencoder, VaeConfig
from shortcut_jax.sources.models import param_shapes
from shortcut_jax.weights import flux_bfl, flux_diffusers
from shortcut_jax.weights.rules import check, torch_shapes
from shortcut_jax.weights.text import CLIP_PAIR_RULES, CLIP_RULES, T5_RULES
from shortcut_jax.weights.vae import bfl_rules, diffusers_rules


def _meta(make):
    import torch

    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in make().state_dict().items()}


def _transformer(guidance):
    from diffusers import FluxTransformer2DModel

    return _meta(lambda: FluxTransformer2DModel(guidance_embeds=guidance))


def _vae():
    from diffusers import AutoencoderKL

    levels = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32)
    types = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    return _meta(
        lambda: AutoencoderKL(**levels, **types, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
    )


def _t5():
    from transformers import T5Config as Config
    from transformers import T5EncoderModel

    geometry = dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128)
    names = _meta(lambda: T5EncoderModel(Config(**geometry, feed_forward_proj="gated-gelu")))
    return {k: v for k, v in names.items() if k != "encoder.embed_tokens.weight"}


def _clip():
    from transformers import CLIPTextConfig, CLIPTextModel

    geometry = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    # The released files keep the prefix that the library has dropped.
    return {f"text_model.{k}": v for k, v in _meta(lambda: CLIPTextModel(CLIPTextConfig(**geometry))).items()}


def _clip_pair():
    """CLIP ViT-L/14; the scores do without its temperature."""
    from transformers import CLIPConfig, CLIPModel

    words = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    image = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
    config = CLIPConfig(text_config=words, vision_config=image, projection_dim=768)
    return {k: v for k, v in _meta(lambda: CLIPModel(config)).items() if k != "logit_scale"}


def _ours(init, *args):
    return {k: tuple(v.shape) for k, v in flat_paths(jax.eval_shape(init, *args)).items()}


def _initialized(model, example):
    return _ours(lambda key: model.init(key, example)["params"], jax.random.key(0))


def _flux(name):
    return _ours(lambda key: init_params(preset(name), key), jax.random.key(0))


CASES = {
    "flux-dev": lambda: (_transformer(True), _flux("flux-dev"), flux_diffusers.RULES),
    "flux-schnell": lambda: (_transformer(False), _flux("flux-schnell"), flux_diffusers.RULES),
    "vae": lambda: (
        _vae(),
        _initialized(Autoencoder(VaeConfig()), np.zeros((1, 8, 8, 3), np.float32)),
        diffusers_rules(4, 2),
    ),
    "t5": lambda: (_t5(), _initialized(T5Encoder(T5Config()), np.zeros((1, 4), np.int32)), T5_RULES),
    "clip": lambda: (_clip(), _initialized(ClipText(ClipConfig()), np.zeros((1, 4), np.int32)), CLIP_RULES),
    "clip_score": lambda: (_clip_pair(), param_shapes("clip_score", ClipPairConfig()), CLIP_PAIR_RULES),
}


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_of_the_release_maps_to_ours_and_back(name):
    theirs, ours, rules = CASES[name]()
    check(theirs, rules, ours)
    assert torch_shapes(ours, rules) == theirs


def test_black_forest_labs_files_have_as_many_values():
    for ours, rules in (
        (_flux("flux-dev"), flux_bfl.RULES),
        (CASES["vae"]()[1], bfl_rules(4, 2)),
    ):
        there = torch_shapes(ours, rules)
        check(there, rules, ours)
        assert sum(np.prod(s) for s in there.values()) == sum(np.prod(s) for s in ours.values())
    names = torch_shapes(_flux("flux-dev"), flux_bfl.RULES)
    assert len(names) == 780
    assert names["single_blocks.37.linear1.weight"] == (21504, 3072)
    assert names["double_blocks.18.img_attn.qkv.weight"] == (9216, 3072)
