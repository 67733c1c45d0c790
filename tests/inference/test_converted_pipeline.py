"""The whole pipeline against diffusers from the same noise, on small random weights."""

import copy
import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from shortcut_jax import TextToImage, cli, convert, sample
from shortcut_jax.core.latents import patchify, unpatchify
from shortcut_jax.core.schedules import Spacing
from shortcut_jax.core.tree import flat_paths
from shortcut_jax.errors import ConversionError, ConvertedError, UsageError
from shortcut_jax.formats import export
from shortcut_jax.formats.inference_checkpoint import write_params
from shortcut_jax.inference import converted_editor
from shortcut_jax.inference.image_files import read_records
from shortcut_jax.inference.request import SampleRequest
from shortcut_jax.sources.models import PIPELINE_KINDS, open_models
from shortcut_jax.weights.lora_files import to_peft
from tests.flux_pipeline import convert_pipeline, make_pipeline
from tests.helpers import relative
from tests.weights.lora_cases import random_modules

EIGHT_DEVICES = jax.devices()
pytestmark = pytest.mark.usefixtures("one_device_of_module")
PROMPTS = ["a red cat with a small dog", "a photo of zebras"]
HEIGHT, WIDTH, STEPS, TEXT_TOKENS = 24, 40, 4, 32
TOLERANCE = 1e-4
SMALL = dict(height=HEIGHT, width=WIDTH, text_tokens=TEXT_TOKENS)


def _pair(source, converted):
    """Ours on one device and diffusers' pipeline, with one noise for both; each a function to packed latents."""
    import torch
    from diffusers import FluxPipeline

    ours = TextToImage(converted, devices=jax.devices()[:1])
    reference = FluxPipeline.from_pretrained(source)
    reference.set_progress_bar_config(disable=True)
    noise_BNC = np.array(ours.draw_noise(0, 0, len(PROMPTS), HEIGHT, WIDTH))

    def expected(**changes):
        options = dict(prompt=PROMPTS, num_inference_steps=STEPS, max_sequence_length=TEXT_TOKENS, guidance_scale=2.5)
        size = dict(height=HEIGHT, width=WIDTH, latents=torch.from_numpy(noise_BNC), output_type="latent")
        return np.asarray(reference(**{**options, **size, **changes}).images)

    def actual(prompts=PROMPTS, guidance=2.5, text_tokens=TEXT_TOKENS, **changes):
        with jax.default_matmul_precision("highest"):
            condition = ours.encode(prompts, guidance, text_tokens)
            return patchify(ours.denoise(noise_BNC, condition, (HEIGHT, WIDTH), STEPS, **changes))

    return SimpleNamespace(ours=ours, reference=reference, noise=noise_BNC, expected=expected, actual=actual)


@pytest.fixture(scope="module")
def dev(pipeline_folder, converted_folder):
    return _pair(pipeline_folder, converted_folder)


@pytest.fixture(scope="module")
def schnell(tmp_path_factory):
    source = make_pipeline(tmp_path_factory.mktemp("schnell") / "pipeline", guidance=False)
    return _pair(source, convert_pipeline(source, source.with_name("converted")))


@pytest.mark.slow
def test_latents_equal_those_of_diffusers(dev):
    assert relative(dev.actual(), dev.expected()) <= TOLERANCE


def test_a_wrong_guidance_prompt_shift_or_text_length_would_be_seen(dev):
    expected = dev.expected()
    for wrong in (
        dict(guidance=2.6),
        dict(prompts=["a red cat with a large dog", PROMPTS[1]]),
        dict(shift=1.7),  # 1.59 is right
        dict(text_tokens=TEXT_TOKENS - 1),
    ):
        latents = dev.actual(**wrong)
        assert relative(latents, expected) >= 20 * TOLERANCE, wrong
        image, right = (dev.ours.decode(unpatchify(x, HEIGHT // 2, WIDTH // 2)) for x in (latents, expected))
        assert np.abs(image - right).max() >= 20e-3 * np.std(right), wrong


def test_latents_equal_those_of_diffusers_with_another_spacing_of_times(dev, monkeypatch):
    reference = dev.reference.scheduler
    spaced = type(reference).from_config(reference.config, use_karras_sigmas=True, shift_terminal=0.1)
    monkeypatch.setattr(dev.reference, "scheduler", spaced)
    ours, uniform = copy.copy(dev.ours), dev.actual()
    ours.sampling = dataclasses.replace(ours.sampling, spacing=Spacing("karras", 0.1))
    vars(ours).pop("_sample", None)  # it was compiled for another spacing
    with jax.default_matmul_precision("highest"):
        condition = ours.encode(PROMPTS, 2.5, TEXT_TOKENS)
        latents = patchify(ours.denoise(dev.noise, condition, (HEIGHT, WIDTH), STEPS))
    assert relative(latents, dev.expected()) <= TOLERANCE
    assert relative(uniform, dev.expected()) >= 20 * TOLERANCE


@pytest.mark.slow
def test_decoded_images_equal_those_of_diffusers_before_rounding(dev, highest_precision):
    import torch

    packed, vae = torch.from_numpy(dev.expected()), dev.reference.vae
    latents = dev.reference._unpack_latents(packed, HEIGHT, WIDTH, dev.reference.vae_scale_factor)
    with torch.no_grad():
        expected = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample.numpy()
    condition = dev.ours.encode(PROMPTS, 2.5, TEXT_TOKENS)
    images = dev.ours.decode(dev.ours.denoise(dev.noise, condition, (HEIGHT, WIDTH), STEPS))
    assert images.shape == (2, HEIGHT, WIDTH, 3)
    assert np.abs(images - expected.transpose(0, 2, 3, 1)).max() <= 1e-3 * expected.std()
    images = dev.expected(output_type="np")
    called = dev.ours(PROMPTS, STEPS, 2.5, **SMALL)  # the noise of seed 0 is that of the fixture
    assert np.abs(called - 255 * images).max() <= 0.5 + 1e-3 * 255


def test_guidance_is_3_5_by_default_and_the_shift_follows_the_size(dev):
    assert str(dev.ours.guidance()) == "guidance 3.5: through the guidance embedding"
    assert relative(dev.actual(guidance=None), dev.expected(guidance_scale=3.5)) <= TOLERANCE
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (dev.noise.shape[1] - 256)
    assert relative(dev.actual(shift=float(np.exp(mu))), dev.actual()) <= 1e-6


@pytest.mark.slow
def test_a_model_without_guidance_embedding_has_none_by_default_and_a_fixed_shift(schnell):
    assert str(schnell.ours.guidance()) == "guidance: none"
    assert schnell.ours.sampling.text_tokens == 256
    expected = schnell.expected(guidance_scale=0.0)
    assert relative(schnell.actual(guidance=None), expected) <= TOLERANCE
    assert relative(schnell.actual(guidance=None, shift=1.05), expected) >= 20 * TOLERANCE


def test_classifier_free_guidance_equals_that_of_diffusers(schnell):
    assert str(schnell.ours.guidance(2.5)) == "guidance 2.5: classifier-free, two evaluations a step"
    with jax.default_matmul_precision("highest"):
        negative = schnell.ours.encode([""] * len(PROMPTS), 2.5, TEXT_TOKENS)
        called = schnell.ours(PROMPTS, STEPS, 2.5, **SMALL)
    expected = schnell.expected(true_cfg_scale=2.5, negative_prompt=[""] * len(PROMPTS))
    assert relative(schnell.actual(negative=(negative, 2.5)), expected) <= TOLERANCE
    assert relative(schnell.actual(negative=(negative, 2.6)), expected) >= 20 * TOLERANCE
    images = schnell.expected(true_cfg_scale=2.5, negative_prompt=[""] * len(PROMPTS), output_type="np")
    assert np.abs(called - 255 * images).max() <= 0.5 + 1e-3 * 255


def test_an_image_depends_on_seed_number_and_prompt_only(dev):
    first = dev.ours(["a cat", "a dog", "a cat"], STEPS, **SMALL)
    assert first.shape == (3, HEIGHT, WIDTH, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(dev.ours(["a cat", "seven"], STEPS, **SMALL)[0], first[0])
    twice = dev.ours("a cat", STEPS, num=3, **SMALL)
    np.testing.assert_array_equal(twice[[0, 2]], first[[0, 2]])
    assert not np.array_equal(twice[0], twice[1])
    assert not np.array_equal(dev.ours("a cat", STEPS, seed=1, **SMALL)[0], first[0])


def test_one_program_serves_every_number_of_steps_and_images_and_every_shift(dev):
    dev.ours("a cat", 1, **SMALL)
    before = dev.ours._sample._cache_size()
    for options in (dict(steps=2), dict(steps=7, num=3), dict(shift=2.0), dict(guidance=1.5), dict(seed=3)):
        dev.ours("a dog", **{**SMALL, **options})
    assert dev.ours._sample._cache_size() == before
    dev.ours("a cat", 1, **{**SMALL, "width": HEIGHT})
    assert dev.ours._sample._cache_size() == before + 1


def test_draws_batches_methods_and_trajectories_of_a_pipeline(dev):
    prompts, draws = ["a cat", "a dog", "seven"], [(4, 0), (0, 1), (4, 0)]
    drawn = dev.ours(prompts, STEPS, draws=draws, batch_size=2, **SMALL)
    np.testing.assert_allclose(drawn[0].astype(int), dev.ours("a cat", STEPS, seed=4, **SMALL)[0], atol=1)
    np.testing.assert_allclose(drawn[1].astype(int), dev.ours(prompts, STEPS, **SMALL)[1], atol=1)
    along = dev.ours.trajectory(prompts, STEPS, draws=draws, batch_size=2, **SMALL)
    assert along.shape == (3, STEPS + 1, HEIGHT, WIDTH, 3)
    np.testing.assert_allclose(along[:, -1].astype(int), drawn, atol=1)
    one, two = (dev.ours("a cat", n, method="heun", **SMALL).astype(int) for n in (1, 2))
    np.testing.assert_allclose(one, dev.ours("a cat", 1, **SMALL), atol=1)
    assert np.abs(two - dev.ours("a cat", 2, **SMALL)).max() > 1


def test_an_edit_between_equal_prompts_is_what_the_autoencoder_makes_of_the_image(dev):
    images = np.random.default_rng(0).integers(0, 256, (1, HEIGHT, WIDTH, 3), np.uint8)
    through = dev.ours.vae_codec.decode(dev.ours.vae_codec.latents(images))
    small = dict(steps=3, skip=1, text_tokens=TEXT_TOKENS)
    edit = lambda target, **options: dev.ours.edit(images, "a cat", target, **small, **options)
    np.testing.assert_array_equal(edit("a cat"), through)
    dog = edit("a dog")
    assert dog.shape == images.shape and not np.array_equal(dog, through)
    np.testing.assert_array_equal(edit("a dog", draws=[(0, 0)]), dog)
    assert not np.array_equal(edit("a dog", draws=[(1, 0)]), dog)
    assert not np.array_equal(edit("a cat", source_guidance=1.0), through)
    with pytest.raises(ValueError, match="30 x 40, but both must be multiples of 4"):
        dev.ours.edit(np.zeros((1, 30, 40, 3), np.uint8), "a cat", "a dog")


def test_an_edit_is_guided_where_either_side_asks_for_it(schnell, monkeypatch):
    """What the scales do is tested with the editor itself."""
    images, asked = np.zeros((1, HEIGHT, WIDTH, 3), np.uint8), []

    def edit(params, shift, latents, draws, source, target, plan, negative, scales, **_):
        asked.append((shift, plan.skip, negative is not None, *scales))
        return latents

    monkeypatch.setattr(converted_editor, "edit_program", lambda *args: edit)
    call = lambda **scales: schnell.ours.edit(images, "a cat", "a dog", 2, 1, text_tokens=TEXT_TOKENS, **scales)
    call(), call(guidance=3.0), call(guidance=3.0, source_guidance=1.0), call(source_guidance=2.0, shift=4.0)
    assert asked == [(1.0, 1, False, 1, 1), (1.0, 1, True, 3, 3), (1.0, 1, True, 1, 3), (4.0, 1, True, 2, 1)]


@pytest.mark.slow
def test_eight_devices_with_padded_rows_equal_one(dev, converted_folder, highest_precision):
    eight = TextToImage(converted_folder, devices=EIGHT_DEVICES)
    assert eight.mesh.shape["fsdp"] == 8
    prompts = [*PROMPTS, "seven"]
    actual, expected = (
        p.denoise(p.draw_noise(0, 0, 3, HEIGHT, WIDTH), p.encode(prompts, 2.5, TEXT_TOKENS), (HEIGHT, WIDTH), STEPS)
        for p in (eight, dev.ours)
    )
    assert actual.shape == expected.shape == (3, HEIGHT // 2, WIDTH // 2, 16)
    assert relative(actual, expected) <= 1e-5
    assert relative(eight.decode(actual), dev.ours.decode(expected)) <= 1e-5
    images = [p(prompts, STEPS, 2.5, num=3, **SMALL).astype(int) for p in (eight, dev.ours)]
    assert images[0].shape == (9, HEIGHT, WIDTH, 3) and np.abs(images[0] - images[1]).max() <= 1
    for kind, name in (("flux", "single_blocks/mlp_in/kernel"), ("t5", "encoder_blocks/mlp_gate/kernel")):
        kernel = flat_paths(eight.params[kind])[name]
        assert kernel.sharding.shard_shape(kernel.shape)[1] == kernel.shape[1] // 8


@pytest.mark.slow
def test_weights_stay_as_stored_and_are_computed_with_in_the_dtype_asked_for(dev, pipeline_folder, tmp_path):
    import ml_dtypes

    folder = convert_pipeline(pipeline_folder, tmp_path / "half", np.dtype(ml_dtypes.bfloat16))
    half = TextToImage(folder, compute_dtype="bfloat16", devices=jax.devices()[:1])
    assert {x.dtype for x in jax.tree.leaves(half.params)} == {np.dtype(ml_dtypes.bfloat16)}
    condition = half.encode(PROMPTS, 2.5, TEXT_TOKENS)
    assert condition.txt_BMT.dtype == condition.vec_BV.dtype == ml_dtypes.bfloat16
    latents = half.denoise(dev.noise, condition, (HEIGHT, WIDTH), STEPS)
    assert latents.dtype == np.float32 and relative(patchify(latents), dev.actual()) < 0.05
    # In float32 on the same weights only their rounding is left.
    wide = TextToImage(folder, devices=jax.devices()[:1])
    assert wide.compute_dtype == "float32"
    latents = wide.denoise(dev.noise, wide.encode(PROMPTS, 2.5, TEXT_TOKENS), (HEIGHT, WIDTH), STEPS)
    assert 1e-4 < relative(patchify(latents), dev.actual()) < 0.03
    rounded = TextToImage(folder, devices=jax.devices()[:1], matmul_dtype="float8")
    assert rounded.computed == "computed in float32, products in float8"
    asked = SampleRequest((PROMPTS[0],))
    assert rounded.facts(asked) == wide.facts(asked) | {"matmul_dtype": "float8"}
    other = rounded.denoise(dev.noise, rounded.encode(PROMPTS, 2.5, TEXT_TOKENS), (HEIGHT, WIDTH), STEPS)
    assert 1e-3 < relative(other, latents) < 0.1


def test_what_is_cut_off_a_prompt_is_told(dev, capfd):
    prompt = "a photo of " + "the cat and " * 5
    assert dev.ours.prompt_notes(SampleRequest(("a cat",), text_tokens=64)) == []
    clip, t5 = dev.ours.prompt_notes(SampleRequest(("a cat", prompt), text_tokens=12))
    assert clip.startswith("CLIP reads 16 tokens of 'a photo of the cat and") and "is cut off" in clip
    assert t5.startswith("T5 reads 12 tokens of 'a photo of")
    # Each line once, however often the prompt comes.
    capfd.readouterr()
    for _ in range(2):
        dev.ours.tell(SampleRequest((prompt, prompt, "a cat"), text_tokens=12))
    assert capfd.readouterr().err.count("is cut off") == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(height=30), r"30 x 40, but both must be multiples of 4: the nearest is 32 x 40"),
        (dict(width=1), r"24 x 1, but .* the nearest is 24 x 4"),
        (dict(steps=0), "steps is 0, but must be at least 1"),
        (dict(num=0), "num is 0"),
        (dict(text_tokens=0), "text_tokens is 0"),
        (dict(shift=0.0), "shift is 0, but must be positive"),
        (dict(shift=float("inf")), "shift is inf, but must be positive and finite"),
        (dict(guidance=float("nan")), "guidance is nan, but must be finite"),
        (dict(steps=1001), "steps is 1001, but must be at most 1000"),
        (dict(height=10**400), "height is a number of 1329 bits, but must be at most 16384"),
        (dict(width=-8), "24 x -8, but both must be multiples of 4: the nearest is 24 x 4"),
        (dict(seed=2**32), "the seed 4294967296 is out of range"),
        (dict(seed=-1), "the seed -1 is out of range"),
        (dict(batch_size=10**9), "batch_size is 1000000000, but must be at most"),
        (dict(prompts=["\udcff"]), r"is not UTF-8"),
        (dict(guidance=-1.0), "guidance is -1, but must not be negative"),
        (dict(prompts=[]), "prompts is 0"),
    ],
)
def test_arguments_out_of_range_are_refused_before_weights_are_read(options, text, converted_folder):
    fresh = TextToImage(converted_folder)
    with pytest.raises(ValueError, match=text):
        fresh(**{"prompts": "a cat", **SMALL, **options})
    assert "params" not in vars(fresh)


def test_seeds_are_those_of_the_images_and_an_edit_takes_its_own_options_alone(schnell):
    several = schnell.ours("a cat", 1, num=2, seeds=(5, 3), **SMALL)
    for seed, image in zip((5, 3), several, strict=True):
        assert np.abs(schnell.ours("a cat", 1, seed=seed, **SMALL)[0].astype(int) - image).max() <= 1
    with pytest.raises(TypeError, match="an edit takes no method, but average, draws, guidance,"):
        schnell.ours.edit(several[:1], "a cat", "a dog", 2, method="heun")


def test_guidance_zero_without_embedding_means_none_as_in_diffusers(schnell):
    assert schnell.ours.guidance(0.0) == schnell.ours.guidance(1.0) == schnell.ours.guidance()
    expected = schnell.ours("a cat", 2, **SMALL)
    np.testing.assert_array_equal(schnell.ours("a cat", 2, 0.0, **SMALL), expected)
    edit = lambda scale: schnell.ours.edit(expected, "a cat", "a dog", 2, guidance=scale, text_tokens=TEXT_TOKENS)
    np.testing.assert_array_equal(edit(0.0), edit(None))


def test_weights_that_are_not_finite_are_told_instead_of_black_images(dev):
    latents = np.zeros((1, HEIGHT // 2, WIDTH // 2, 16), np.float32)
    assert dev.ours.to_images(latents).shape == (1, HEIGHT, WIDTH, 3)
    with pytest.raises(ConvertedError, match="the images have values that are not finite"):
        dev.ours.to_images(latents * np.nan)


@pytest.mark.parametrize("kind", PIPELINE_KINDS)
def test_weights_that_are_not_finite_are_named_as_they_are_read(kind, converted_folder, tmp_path):
    (model,) = [m for m in open_models(converted_folder) if m.kind == kind]
    params = {path: np.zeros(s.shape, s.dtype) for path, s in model.specs.items()}
    name = next(path for path in params if kind != "vae" or path.startswith("decoder"))
    params[name] = np.full_like(params[name], np.nan)
    folder = shutil.copytree(converted_folder, tmp_path / "bad")
    shutil.rmtree(folder / kind)
    write_params(folder / kind, params.items())
    broken = TextToImage(folder, devices=jax.devices()[:1])
    with pytest.raises(ConversionError, match=f"^{kind} of {folder}: {name} has values that are NaN or infinite"):
        _ = broken.params  # what comes before any sampling


def _changed(folder, target, change):
    shutil.copytree(folder, target)
    record = json.loads((target / "models.json").read_text())
    change(record["models"])
    (target / "models.json").write_text(json.dumps(record))
    return target


def test_a_folder_that_is_no_whole_pipeline_is_one_clear_line(converted_folder, pipeline_folder, tmp_path):
    def fails(folder, text):
        with pytest.raises(ConvertedError, match=text):
            TextToImage(folder)

    fails(tmp_path / "no", "no is not found$")
    fails(pipeline_folder, "is no converted folder, for it has no models.json: make one with python -m")
    only = _changed(converted_folder, tmp_path / "only", lambda m: [m.pop(k) for k in ("vae", "t5", "clip")])
    fails(
        only, "holds flux, but images need vae, clip, t5 too: convert again from a whole pipeline, or with one --from"
    )
    other = _changed(converted_folder, tmp_path / "other", lambda m: m["t5"]["config"].update(width=64))
    fails(other, "the transformer's text width is 32, but T5's is 64")
    small = _changed(converted_folder, tmp_path / "small", lambda m: m["clip"]["config"].update(vocab=50))
    fails(small, "the tokenizer of CLIP has 575 tokens, but the model knows 50")
    shutil.rmtree(small / "tokenizer_2")
    fails(small, "there is no tokenizer of T5 in .*: convert again with --tokenizer and --tokenizer_2")
    deep = _changed(converted_folder, tmp_path / "deep", lambda m: m["flux"]["config"].update(mlp_ratio=2))
    odd = _changed(converted_folder, tmp_path / "odd", lambda m: m["flux"]["config"].update(heads=3))
    with pytest.raises(ConvertedError, match=r"no model has this geometry \(.*\): convert it again"):
        TextToImage(odd)("a cat", **SMALL)
    for folder in (deep, odd):
        with pytest.raises(ConvertedError, match="convert it again"):
            convert.main(["convert", f"--from={folder}", f"--to={tmp_path}/out", "--format=diffusers"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConvertedError, match=r"flux of .*/deep .* is \(2, .*, not \(2, .*: convert it again"):
        TextToImage(deep)("a cat", **SMALL)


@pytest.mark.slow
def test_the_command_writes_an_image_of_the_right_size_and_tells_what_it_does(converted_folder, tmp_path, capfd):
    out = tmp_path / "cat.png"
    size = [f"--height={HEIGHT}", f"--width={WIDTH}", "--text_tokens=12"]
    argv = ["sample", f"--checkpoint={converted_folder}", *size, "--guidance=2", "--steps=2", "--seed=3"]
    assert sample.main([*argv, "--prompt=a photo of the cat and the dog and the cat", f"--out={out}"]) == 0
    err = capfd.readouterr().err
    for line in (
        f"flux of {converted_folder} (Flux transformer with guidance",
        f"t5 of {converted_folder} (T5 encoder",
        "guidance 2: through the guidance embedding; computed in float32",
        "T5 reads 12 tokens of 'a photo of the cat and the dog and the c'",
        "1 image of 24 x 40 in 2 steps, ",
    ):
        assert line in err
    assert err.count("T5 reads 12 tokens") == err.count("CLIP reads 16") + 1 == 1
    with Image.open(out) as image:
        assert (image.width, image.height) == (WIDTH, HEIGHT)
        pixels = np.asarray(image)
    prompt = "a photo of the cat and the dog and the cat"
    called = TextToImage(converted_folder)(prompt, 2, 2.0, HEIGHT, WIDTH, seed=3, text_tokens=12)
    np.testing.assert_array_equal(pixels, called[0])
    assert sample.main([*argv, "--prompt=a cat", "--prompt=a dog", "--num=2", f"--out={out}"]) == 0
    assert "4 images" in capfd.readouterr().err
    with Image.open(out) as sheet:
        assert sheet.width > 2 * WIDTH and sheet.height > 2 * HEIGHT


def test_the_command_edits_a_photo_at_a_size_that_the_pipeline_can_make(one_device, converted_folder, tmp_path, capfd):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (25, 39, 3), np.uint8)).save(tmp_path / "in.png")
    argv = ["sample", f"--checkpoint={converted_folder}", f"--edit={tmp_path}/in.png", "--source_prompt=a cat"]
    argv += ["--prompt=a dog", "--steps=2", "--skip=1", f"--text_tokens={TEXT_TOKENS}", f"--out={tmp_path}/out.png"]
    assert sample.main(argv) == 0
    assert "the image of 25 x 39 is resized and cut to 24 x 40" in capfd.readouterr().err
    with Image.open(tmp_path / "out.png") as image:
        assert (image.height, image.width) == (24, 40)
    (made,) = read_records(tmp_path / "out.png")
    assert (made["source_prompt"], made["skip"], made["guidance"], made["lora"]) == ("a cat", 1, 3.5, [])
    assert (made["height"], made["width"]) == (24, 40)


def test_bad_input_to_the_command_is_one_clear_line(converted_folder, pipeline_folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(TextToImage, "params", property(lambda self: pytest.fail("weights were read")))

    def fails(*argv):
        with pytest.raises(SystemExit) as stop:
            cli.run(sample.main, ["sample", "--prompt=a cat", *argv])
        assert stop.value.code == 1
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    good = f"--checkpoint={converted_folder}"
    assert "give one of --workdir and --checkpoint" in fails()
    assert "give one of --workdir and --checkpoint" in fails(good, "--workdir=x")
    assert "--view goes with --workdir, not with --checkpoint" in fails(good, "--view=fast")
    assert "--height goes with --checkpoint, not with --workdir" in fails("--workdir=x", "--height=8")
    assert "height x width is 30 x 1024" in fails(good, "--height=30")
    assert "--steps is 0" in fails(good, "--steps=0")
    assert "text_tokens is 0" in fails(good, "--text_tokens=0")
    assert "no is not found" in fails(f"--checkpoint={tmp_path}/no")
    assert "is no converted folder" in fails(f"--checkpoint={pipeline_folder}")


def test_adapters_are_added_by_their_strengths(converted_folder, tmp_path):
    base = TextToImage(converted_folder, devices=jax.devices()[:1])
    flux = base.models["flux"]
    shapes = {k: spec.shape for k, spec in flux.specs.items()}
    files = [tmp_path / f"{k}.safetensors" for k in range(2)]
    for seed, file in enumerate(files):
        export.write_tensors(file, *to_peft(random_modules(shapes, seed=seed)))
    kernel = lambda t2i: np.asarray(t2i.models["flux"].params["single_blocks/mlp_in/kernel"])
    of = lambda *loras: kernel(TextToImage(converted_folder, devices=jax.devices()[:1], loras=loras))
    plain, one, two = kernel(base), of((files[0], 1.0)), of((files[1], 1.0))
    assert relative(one, plain) > 0.1
    np.testing.assert_allclose(of((files[0], 0.0)), plain, atol=1e-6)
    np.testing.assert_allclose(of((files[0], 1.25)) - plain, 1.25 * (one - plain), atol=1e-5)
    both = of((files[0], 0.5), (files[1], -0.25))
    np.testing.assert_allclose(both - plain, 0.5 * (one - plain) - 0.25 * (two - plain), atol=1e-5)
    with pytest.raises(ConvertedError, match="is not found"):
        of((tmp_path / "nowhere", 1.0))


def test_the_command_takes_several_adapters(converted_folder, tmp_path, capfd):
    base = TextToImage(converted_folder, devices=jax.devices()[:1])
    shapes = {k: spec.shape for k, spec in base.models["flux"].specs.items()}
    export.write_tensors(tmp_path / "a.safetensors", *to_peft(random_modules(shapes)))
    argv = [
        "sample",
        f"--checkpoint={converted_folder}",
        "--prompt=a red cat",
        f"--height={HEIGHT}",
        f"--width={WIDTH}",
    ]
    argv += [f"--out={tmp_path}/x.png", "--steps=1", *[f"--lora={tmp_path}/a.safetensors"] * 2]
    with pytest.raises(UsageError, match="--lora is given 2 times, --lora_scale 1"):
        sample.main([*argv, "--lora_scale=1.25"])
    assert sample.main([*argv, "--lora_scale=1.25", "--lora_scale=0.5"]) == 0
    assert "with 1.25 x a.safetensors with 0.5 x a.safetensors" in capfd.readouterr().err
