import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.core.latents import image_ids, text_ids
from shortcut_jax.core.tree import flat_paths
from shortcut_jax.errors import ConversionError
from shortcut_jax.models.flux import Flux
from shortcut_jax.models.init import weight_shapes
from shortcut_jax.models.presets import preset
from shortcut_jax.weights.flux_diffusers import RULES
from shortcut_jax.weights.rules import nest
from tests.helpers import to_flax, to_torch

GEOMETRIES = {
    "guidance": dict(guidance=True),
    "plain": dict(double_blocks=1, single_blocks=3, heads=4, axes=(2, 2, 4)),
}


def _config(**changes):
    return dataclasses.replace(preset("tiny"), **changes)


def _reference(cfg):
    """A diffusers transformer of the same geometry with random weights of visible size everywhere."""
    import torch
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=cfg.channels,
        num_layers=cfg.double_blocks,
        num_single_layers=cfg.single_blocks,
        attention_head_dim=cfg.head_size,
        num_attention_heads=cfg.heads,
        joint_attention_dim=cfg.text_width,
        pooled_projection_dim=cfg.pooled_width,
        guidance_embeds=cfg.guidance,
        axes_dims_rope=cfg.axes,
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.1 + (1.0 if "norm_" in name and p.ndim == 1 else 0.0))
    return model


def _shapes(cfg):
    return {k: v.shape for k, v in flat_paths(weight_shapes(cfg)).items()}


def _weights(model):
    return {k: v.numpy() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("size", [(4, 8), (6, 2)])
def test_output_equals_diffusers_on_non_square_images(name, size, highest_precision, exact_frequencies):
    import torch

    cfg = _config(**GEOMETRIES[name])
    model = _reference(cfg)
    params = nest(to_flax(_weights(model), RULES, _shapes(cfg)))
    rng = np.random.default_rng(1)
    n = size[0] * size[1] // 4
    x, txt, vec = (
        rng.standard_normal(s).astype("f")
        for s in ((2, n, cfg.channels), (2, 5, cfg.text_width), (2, cfg.pooled_width))
    )
    t, guidance = np.array([0.9, 0.3], "f"), np.array([3.5, 1.0], "f") if cfg.guidance else None
    img_ids, txt_ids = np.array(image_ids(*size)), np.array(text_ids(5))
    with torch.no_grad():
        expected = model(
            hidden_states=torch.from_numpy(x),
            encoder_hidden_states=torch.from_numpy(txt),
            pooled_projections=torch.from_numpy(vec),
            timestep=torch.from_numpy(t),
            img_ids=torch.from_numpy(img_ids),
            txt_ids=torch.from_numpy(txt_ids),
            guidance=None if guidance is None else torch.from_numpy(guidance),
        ).sample.numpy()
    apply = jax.jit(Flux(cfg).apply)
    actual = apply({"params": params}, x, t, txt, vec, img_ids, txt_ids, guidance)
    assert np.linalg.norm(expected) > 0.1
    assert np.linalg.norm(actual - expected) / np.linalg.norm(expected) <= 1e-5
    # The comparison can fail: transposed positions are another image.
    turned = apply({"params": params}, x, t, txt, vec, img_ids[:, [0, 2, 1]], txt_ids, guidance)
    assert np.linalg.norm(turned - expected) / np.linalg.norm(expected) > 1e-3


@pytest.mark.parametrize("name", GEOMETRIES)
def test_there_and_back_is_the_identity(name):
    cfg = _config(**GEOMETRIES[name])
    weights = _weights(_reference(cfg))
    back = to_torch(to_flax(weights, RULES, _shapes(cfg)), RULES)
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[k], weights[k]) for k in weights)


def test_missing_leftover_and_misshapen_names_are_named():
    cfg = _config()
    weights = _weights(_reference(cfg))
    without = {k: v for k, v in weights.items() if k != "x_embedder.bias"}
    with pytest.raises(ConversionError, match=r"missing from the checkpoint: x_embedder\.bias"):
        to_flax(without, RULES, _shapes(cfg))
    with pytest.raises(ConversionError, match=r"not in this model: extra\.weight"):
        to_flax({**weights, "extra.weight": np.zeros(1)}, RULES, _shapes(cfg))
    with pytest.raises(ConversionError, match=r"proj_out\.weight"):
        to_flax({**weights, "proj_out.weight": np.zeros((3, 5))}, RULES, _shapes(cfg))
    with pytest.raises(ConversionError, match="without a row"):
        to_torch({"img_in/other": np.zeros(1)}, RULES)


def test_jitted_bfloat16_stays_close_to_float32():
    cfg = _config()
    params = nest({k: jnp.asarray(v) for k, v in to_flax(_weights(_reference(cfg)), RULES, _shapes(cfg)).items()})
    args = (
        jnp.ones((1, 8, cfg.channels)),
        jnp.ones((1,)),
        jnp.ones((1, 3, cfg.text_width)),
        jnp.ones((1, cfg.pooled_width)),
    )
    ids = (image_ids(4, 8), text_ids(3))
    full = jax.jit(Flux(cfg).apply)({"params": params}, *args, *ids)
    half = jax.jit(Flux(dataclasses.replace(cfg, compute_dtype="bfloat16")).apply)({"params": params}, *args, *ids)
    assert half.dtype == jnp.float32
    error = jnp.linalg.norm(half - full) / jnp.linalg.norm(full)
    assert 1e-5 < error < 0.05
