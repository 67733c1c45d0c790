import jax
import numpy as np
import pytest

from shortcut_jax.core.tree import flat_paths
from shortcut_jax.formats import export
from shortcut_jax.formats.safetensors import LazyTensors
from shortcut_jax.models.vae import Autoencoder, VaeConfig, latents_from
from shortcut_jax.weights.rules import nest
from shortcut_jax.weights.vae import bfl_rules, diffusers_rules
from tests.helpers import relative, to_flax, to_torch

CFG = VaeConfig(latent_channels=4, widths=(8, 16, 16), level_blocks=1, groups=4)
RULES = {"diffusers": diffusers_rules(3, 1), "bfl": bfl_rules(3, 1)}


@pytest.fixture(scope="module")
def reference():
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=CFG.widths,
        layers_per_block=CFG.level_blocks,
        latent_channels=CFG.latent_channels,
        norm_num_groups=CFG.groups,
        scaling_factor=CFG.scale,
        shift_factor=CFG.shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model


def _weights(reference):
    return {k: v.numpy() for k, v in reference.state_dict().items()}


def _shapes():
    init = lambda key: Autoencoder(CFG).init(key, np.zeros((1, 8, 8, 3), np.float32))
    return {k: v.shape for k, v in flat_paths(jax.eval_shape(init, jax.random.key(0))["params"]).items()}


@pytest.mark.slow
def test_moments_and_images_equal_diffusers(reference, highest_precision):
    import torch

    params = {"params": nest(to_flax(_weights(reference), RULES["diffusers"], _shapes()))}
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (2, 16, 24, 3)).astype("f")
    with torch.no_grad():
        expected = reference.encode(torch.from_numpy(image).permute(0, 3, 1, 2)).latent_dist
    moments = jax.jit(lambda p, x: Autoencoder(CFG).apply(p, x, method="encode"))(params, image)
    assert moments.mean_BhwC.shape == (2, 4, 6, 4) and CFG.factor == 4
    assert relative(moments.mean_BhwC, expected.mean.permute(0, 2, 3, 1).numpy()) <= 1e-5
    assert relative(moments.logvar_BhwC, expected.logvar.permute(0, 2, 3, 1).numpy()) <= 1e-5

    latents = rng.standard_normal((2, 4, 6, 4)).astype("f")
    z = torch.from_numpy(latents).permute(0, 3, 1, 2) / CFG.scale + CFG.shift
    with torch.no_grad():
        decoded = reference.decode(z).sample.permute(0, 2, 3, 1).numpy()
    actual = jax.jit(lambda p, x: Autoencoder(CFG).apply(p, x, method="decode"))(params, latents)
    assert relative(actual, decoded) <= 1e-5
    turned = Autoencoder(CFG).apply(params, latents[:, ::-1], method="decode")[:, ::-1]
    assert relative(turned, decoded) > 1e-2


def test_latents_are_shifted_and_scaled_samples():
    from shortcut_jax.models.vae import Moments

    mean, logvar = np.full((1, 50, 50, 4), 2.0, "f"), np.full((1, 50, 50, 4), np.log(0.25), "f")
    moments = Moments(mean, logvar)
    np.testing.assert_allclose(latents_from(moments, CFG), (2.0 - CFG.shift) * CFG.scale, rtol=1e-6)
    sample = np.asarray(latents_from(moments, CFG, jax.random.key(0)))
    assert abs(sample.std() / CFG.scale - 0.5) < 0.02
    assert abs(sample.mean() / CFG.scale + CFG.shift - 2.0) < 0.02


@pytest.mark.parametrize("name", RULES)
def test_there_and_back_is_the_identity(name, reference):
    params = to_flax(_weights(reference), RULES["diffusers"], _shapes())
    there = to_torch(params, RULES[name])
    back = to_flax(there, RULES[name], _shapes())
    assert back.keys() == params.keys() == _shapes().keys()
    assert all(np.array_equal(back[k], params[k]) for k in params)
    if name == "diffusers":
        assert all(np.array_equal(there[k], v) for k, v in _weights(reference).items())


def test_bfl_names_are_those_that_diffusers_converts(reference):
    import torch
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    params = to_flax(_weights(reference), RULES["diffusers"], _shapes())
    bfl = {k: torch.from_numpy(v) for k, v in to_torch(params, RULES["bfl"]).items()}
    converted = convert_ldm_vae_checkpoint(bfl, dict(reference.config))
    expected = _weights(reference)
    assert converted.keys() == expected.keys()
    for k, v in expected.items():
        np.testing.assert_array_equal(converted[k].numpy(), v, err_msg=k)


def test_diffusers_reads_our_single_file_with_the_same_output(reference, tmp_path, highest_precision, monkeypatch):
    import torch
    from diffusers import AutoencoderKL

    params = to_flax(_weights(reference), RULES["diffusers"], _shapes())
    file, config = tmp_path / "ae.safetensors", tmp_path / "config"
    export.write_file(file, [export.Part(params, RULES["bfl"])], lambda n: None)
    export.write_component(config, "vae", CFG, params, lambda n: None)
    (config / "diffusion_pytorch_model.safetensors").unlink()  # the weights are the single file's
    load, told = AutoencoderKL.load_state_dict, []
    monkeypatch.setattr(AutoencoderKL, "load_state_dict", lambda *a, **kw: told.append(load(*a, **kw)) or told[-1])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = AutoencoderKL.from_single_file(
        str(file), config=str(config), low_cpu_mem_usage=False, local_files_only=True
    )
    ((missing, unexpected),) = told
    assert missing == unexpected == []
    assert len(LazyTensors([file])) == len(model.state_dict())  # so none of ours was passed over before that

    image = np.random.default_rng(0).uniform(-1, 1, (1, 16, 24, 3)).astype("f")
    ours = {"params": nest(params)}
    mean = Autoencoder(CFG).apply(ours, image, method="encode").mean_BhwC
    decoded = Autoencoder(CFG).apply(ours, (mean - CFG.shift) * CFG.scale, method="decode")
    with torch.no_grad():
        latents = model.encode(torch.from_numpy(image).permute(0, 3, 1, 2)).latent_dist.mean
        images = model.decode(torch.from_numpy(np.array(mean)).permute(0, 3, 1, 2)).sample
    assert relative(mean, latents.permute(0, 2, 3, 1).numpy()) <= 1e-5
    assert relative(decoded, images.permute(0, 2, 3, 1).numpy()) <= 1e-5
