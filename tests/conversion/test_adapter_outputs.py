"""What comes out of post-training: samples, converted adapters, and the same images in diffusers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax import Pipeline, convert, sample, train
from shortcut_jax.core.latents import image_ids, patchify, text_ids
from shortcut_jax.core.schedules import Spacing, sampling_grid
from shortcut_jax.errors import ConfigError, UsageError
from shortcut_jax.sources import models
from shortcut_jax.sources.models import open_lora, open_models
from shortcut_jax.steps.sampling import draw_noise, make_sampler
from shortcut_jax.weights.rules import nest
from tests.helpers import relative


@pytest.mark.slow
def test_sampling_adds_the_adapters_by_their_scale(distilled, trained, one_device):
    captions = ["a handwritten digit seven"]
    draw = lambda p: p(captions, steps=2, num=8)
    base, teacher = Pipeline(distilled, lora_scale=0.0), Pipeline(trained)
    # The base is bfloat16: equal but for its rounding.
    assert np.abs(draw(base).astype(int) - draw(teacher)).max() <= 8
    whole, strong = Pipeline(distilled), Pipeline(distilled, lora_scale=1.5)
    assert np.abs(draw(whole).astype(int) - draw(base)).max() > 8
    assert np.abs(draw(strong).astype(int) - draw(whole)).max() > 2
    with pytest.raises(ValueError, match="base and lora_scale are for runs that trained adapters"):
        Pipeline(trained, lora_scale=1.5)


def test_the_sample_command_takes_scale_and_base(distilled, trained, tmp_path, one_device, capfd):
    out = tmp_path / "x.png"
    argv = [
        "sample",
        f"--workdir={distilled}",
        "--prompt=a handwritten digit two",
        "--steps=1",
        "--num=2",
        f"--out={out}",
    ]
    assert sample.main([*argv, "--lora_scale=1.25", f"--base={trained}"]) == 0
    assert out.is_file()
    for extra, message in (
        (["--lora_scale=1", "--lora_scale=2"], "a workdir has one set of adapters"),
        (["--lora=x.safetensors"], "--lora goes with --checkpoint"),
    ):
        with pytest.raises(UsageError, match=message):
            sample.main([*argv, *extra])


def _modules(path, view="slow"):
    (network,) = (m.config for m in open_models(path, view))
    return open_lora(path, network, view)[0]


@pytest.mark.slow
def test_convert_writes_the_adapters_for_peft_and_comfyui_and_merged(distilled, trained, tmp_path, capfd):
    modules = _modules(distilled)
    network = open_models(distilled)[0].config
    source = ["convert", f"--from={distilled}", "--view=slow"]
    for name, form in (("peft", "diffusers"), ("comfy", "comfy")):
        assert convert.main([*source, f"--to={tmp_path}/{name}.safetensors", f"--format={form}"]) == 0
        back, _ = open_lora(tmp_path / f"{name}.safetensors", network)
        assert back.keys() == modules.keys()
        for module, f in modules.items():
            g = back[module]
            product = lambda x: x.scale * x.up.astype("f") @ x.down.astype("f")
            np.testing.assert_allclose(product(g), product(f), rtol=1e-5, atol=1e-7, err_msg=module)
    assert "sigmas" not in capfd.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "sampling_spacing", lambda settings: Spacing(start=0.98))
        assert convert.main([*source, f"--to={tmp_path}/early.safetensors", "--format=comfy"]) == 0
    assert "sigmas=[0.985, 0.75, 0.5, 0.25]" in capfd.readouterr().err
    assert convert.main([*source, f"--to={tmp_path}/merged", "--merged"]) == 0
    (merged,) = open_models(tmp_path / "merged")
    (base,) = open_models(trained)
    changed = [k for k in base.params if not np.array_equal(base.params[k], merged.params[k])]
    assert set(changed) == {k for k in base.params if k.endswith("/kernel")}
    other = ["convert", f"--from={trained}", f"--lora={distilled}", f"--to={tmp_path}/again"]
    assert convert.main(other) == 0
    (again,) = open_models(tmp_path / "again")
    assert all(np.array_equal(again.params[k], merged.params[k]) for k in merged.params)
    views = [_modules(distilled, v) for v in ("online", "fast")]
    assert not np.array_equal(*(next(iter(m.values())).up for m in views))
    with pytest.raises(UsageError, match="--merged goes with one --from, the workdir of a run that trained"):
        convert.main(["convert", f"--from={trained}", f"--to={tmp_path}/x", "--merged"])


@pytest.mark.slow
def test_guidance_is_distilled_into_an_embedding_that_the_base_has_not(
    tmp_path, post_arguments, one_device, no_end, capfd
):
    changes = {"guidance_mode": "distill", "guidance": "(1.0,4.0)", "model__guidance": True}
    assert train.main(post_arguments(tmp_path / "run", **changes)) == 0
    told = capfd.readouterr().err
    assert "guidance_in start from scratch: the checkpoint has no such embedding" in told
    assert "a self row is evaluated 1 times with a gradient, and 2 + 1 times without" in told
    draw = lambda pipeline, g: pipeline("a handwritten digit two", steps=2, num=4, guidance=g).astype(int)
    base, student = (Pipeline(tmp_path / "run", lora_scale=s) for s in (0.0, 1.0))
    assert np.array_equal(draw(base, 1.0), draw(base, 4.0))  # the embedding's output starts at zero
    assert not np.array_equal(draw(student, 1.0), draw(student, 4.0))
    # Merged weights hold the embedding, and are the same function.
    assert convert.main(["convert", f"--from={tmp_path}/run", "--merged", f"--to={tmp_path}/merged"]) == 0
    (merged,) = open_models(tmp_path / "merged")
    assert merged.config.guidance and np.any(merged.params["guidance_in/out_layer/kernel"])
    student = Pipeline(tmp_path / "run")
    height, width = student.assembly.latent_size
    noise = draw_noise(0, 0, 2, student.assembly.model, height, width)
    sampler = jax.jit(make_sampler(student.assembly.model, (height, width), 2))
    condition = student.generate.condition(["a handwritten digit two"] * 2, 3.0)
    whole = nest({k: jnp.asarray(merged.params[k]) for k in merged.params})
    with jax.default_matmul_precision("highest"):
        one, two = (sampler(weights, noise, condition, 2) for weights in (student.params, whole))
    # The base is bfloat16 in training, and merged as it is stored.
    assert relative(one, two) <= 0.02
    # Adapters alone are of no use to a base without the embedding.
    with pytest.raises(UsageError, match="guidance embedding that its base lacks"):
        convert.main(["convert", f"--from={tmp_path}/run", f"--to={tmp_path}/x.safetensors", "--format=diffusers"])
    # Its merged weights have the embedding, which must not be guided once more.
    with pytest.raises(ConfigError, match="has a guidance embedding already"):
        train.main(post_arguments(tmp_path / "again", init_from=str(tmp_path / "merged"), **changes))


@pytest.fixture
def reference(distilled, trained, tmp_path):
    """Diffusers' transformer: the exported teacher with the exported adapters."""
    import torch
    from diffusers import FluxTransformer2DModel

    argv = ["convert", f"--from={trained}", f"--to={tmp_path}/teacher", "--format=diffusers", "--dtype=bfloat16"]
    assert convert.main(argv) == 0
    assert (
        convert.main(["convert", f"--from={distilled}", f"--to={tmp_path}/lora.safetensors", "--format=diffusers"]) == 0
    )
    model = FluxTransformer2DModel.from_pretrained(tmp_path / "teacher", torch_dtype=torch.float32)
    model.load_lora_adapter(str(tmp_path), weight_name="lora.safetensors")
    return model.eval()


@pytest.mark.slow
def test_exported_adapters_on_the_exported_teacher_give_the_same_images_in_diffusers(
    distilled, reference, one_device, highest_precision, exact_frequencies
):
    import torch

    pipeline = Pipeline(distilled, max_steps=4)
    captions, steps = ["a handwritten digit seven", "a handwritten digit two"], 4
    condition = pipeline.generate.condition(captions, 1.0)
    height, width = pipeline.assembly.latent_size
    noise = np.array(draw_noise(0, 0, len(captions), pipeline.assembly.model, height, width))
    times = np.asarray(sampling_grid(steps, steps))
    x = torch.from_numpy(noise)
    with torch.no_grad():
        for t, after in itertools.pairwise(times):
            (v,) = reference(
                hidden_states=x,
                encoder_hidden_states=torch.from_numpy(np.array(condition.txt_BMT)),
                pooled_projections=torch.from_numpy(np.array(condition.vec_BV)),
                timestep=torch.full((len(captions),), float(t)),
                img_ids=torch.from_numpy(np.array(image_ids(height, width))),
                txt_ids=torch.from_numpy(np.array(text_ids(condition.txt_BMT.shape[1]))),
                return_dict=False,
            )
            x = x - float(t - after) * v
    sampler = jax.jit(make_sampler(pipeline.assembly.model, (height, width), steps))
    sampled = lambda weights: patchify(sampler(weights, jnp.asarray(noise), condition, steps))
    ours = sampled(pipeline.params)
    assert relative(ours, x.numpy()) <= 1e-4
    assert relative(sampled(pipeline.params.base), x.numpy()) >= 20e-4
