import json
import shutil

import jax
import numpy as np
import pytest

from shortcut_jax import cli, convert
from shortcut_jax.core.stats import clip_score
from shortcut_jax.errors import ConvertedError, UsageError
from shortcut_jax.evaluation import features
from shortcut_jax.evaluation.resize import for_clip, for_inception
from shortcut_jax.formats import export
from shortcut_jax.models.inception import InceptionConfig, InceptionV3
from shortcut_jax.sources.models import Model
from shortcut_jax.weights.inception import RULES
from shortcut_jax.weights.rules import nest
from tests.flux_pipeline import CLIP_TOKENS
from tests.helpers import relative, to_flax
from tests.weights.inception_cases import SMALL, random_release, shapes

PROMPTS = ["a red cat", "two green dog", "the seven on a blue photo of a large digit and a small handwritten digit"]


def _images(count, height=20, width=24, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), np.uint8)


@pytest.fixture(scope="module")
def inception_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inception")
    export.write_tensors(folder / "inception.safetensors", random_release(SMALL), {})
    assert convert.main(["convert", f"--from={folder}/inception.safetensors", f"--to={folder}/converted"]) == 0
    return folder / "converted"


@pytest.fixture(scope="module")
def direct():
    params = nest(to_flax(random_release(SMALL), RULES, shapes(SMALL)))
    network = jax.jit(lambda params, x: InceptionV3(SMALL).apply({"params": params}, x))
    return lambda x: network(params, x)


@pytest.mark.slow
def test_inception_is_split_over_devices_and_does_not_depend_on_the_batch(inception_folder, direct, monkeypatch):
    assert len(jax.local_devices()) == 8
    monkeypatch.setattr(features, "ROWS_AT_ONCE", 1)  # eight at once
    inception = features.inception(inception_folder)
    assert (inception.name, inception.size) == ("Frechet distance (InceptionV3 of 1/16 width)", 128)
    given = _images(11)
    actual = inception(given)
    assert actual.shape == (11, 128) and actual.dtype == np.float32
    expected = direct(for_inception(given[8:10], 299, "clean"))
    assert relative(actual[8:10], expected) <= 1e-5 and relative(actual[:2], expected) > 1e-3
    np.testing.assert_array_equal(inception(given[9:10]), actual[9:10])
    grey = _images(2, channels=1)
    np.testing.assert_array_equal(inception(grey), inception(np.repeat(grey, 3, axis=-1)))


def test_legacy_resizing_gives_other_features_under_another_name_also_from_an_unconverted_file(
    inception_folder, direct
):
    file = inception_folder.parent / "inception.safetensors"
    legacy = features.inception(file, "legacy")
    assert legacy.name.endswith("(legacy resizing)")
    given = _images(2)
    assert relative(legacy(given), direct(for_inception(given, 299, "legacy"))) <= 1e-5
    with pytest.raises(UsageError, match="resize is 'nearest', but must be one of clean, legacy"):
        features.inception(file, "nearest")


def test_only_the_release_is_called_fid(monkeypatch):
    monkeypatch.setattr(features, "_open", lambda *args: Model("inception", InceptionConfig(), {}, "the release"))
    monkeypatch.setattr(features, "_inception", lambda *args: None)
    assert features.inception("x")[:2] == ("FID", 2048)
    names = [features.pixels((8, 8, 1)).name, features.random_network(3).name]
    assert names == ["Frechet distance (pixels)", "Frechet distance (random network, seed 3)"]


def test_what_is_absent_is_told_with_the_command_that_makes_it(inception_folder, tmp_path):
    with pytest.raises(ConvertedError, match=r"the InceptionV3 of FID, is not found: make it with python -m shortcut"):
        features.inception(tmp_path / "nowhere")
    with pytest.raises(
        ConvertedError, match=r"does not hold both towers of CLIP: make it with.*clip-vit-large-patch14"
    ):
        features.load_clip(inception_folder)
    with pytest.raises(ValueError, match="no rows"):
        features.random_network()(_images(0))


def test_pixels_are_flat_in_minus_one_to_one_and_few():
    pixels = features.pixels((8, 8, 1))
    given = _images(3, 8, 8, 1)
    assert pixels.size == 64 and pixels(given).dtype == np.float32
    np.testing.assert_allclose(pixels(given), given.reshape(3, 64) / 127.5 - 1, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"images are \[8, 9, 1\], not \[8, 8, 1\]"):
        pixels(_images(3, 8, 9, 1))
    assert features.pixels((64, 64, 1)).size == 4096
    with pytest.raises(UsageError, match=r"images of 64 x 64 x 3 have 12288 values, but pixels serve .* up to 4096"):
        features.pixels((64, 64, 3))


def test_a_random_network_is_its_seed_on_any_devices(monkeypatch):
    network, given = features.random_network(0, 32), _images(13, 8, 8, 1)
    eight = network(given)
    assert eight.shape == (13, 32) and network.size == 32 and eight.std(axis=0).min() > 1e-4
    assert relative(network(given[5:6]), eight[5:6]) <= 1e-6  # of another batch, so perhaps summed in another order
    assert relative(features.random_network(1, 32)(given), eight) > 0.1
    one = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: one)
    assert relative(features.random_network(0, 32)(given), eight) <= 1e-6
    with pytest.raises(ValueError, match="a multiple of 4 features, not 30"):
        features.random_network(0, 30)


@pytest.fixture(scope="module")
def clip_release(tmp_path_factory, pipeline_folder):
    """A whole CLIP as it is released: weights, config and tokenizer in one folder. And the model itself."""
    import dataclasses

    from transformers import CLIPTokenizer

    from tests.weights.test_text import PAIR, clip_pair

    folder = tmp_path_factory.mktemp("clip") / "release"
    tokenizer = CLIPTokenizer.from_pretrained(pipeline_folder / "tokenizer")
    model = clip_pair(dataclasses.replace(PAIR, vocab=len(tokenizer), max_tokens=CLIP_TOKENS))
    model.save_pretrained(folder)
    for file in (pipeline_folder / "tokenizer").iterdir():
        shutil.copy(file, folder)
    assert convert.main(["convert", f"--from={folder}", f"--to={folder.parent}/converted"]) == 0
    return folder, model, tokenizer


def test_clip_embeddings_equal_those_of_transformers(clip_release):
    import torch

    folder, model, tokenizer = clip_release
    clip = features.load_clip(folder.parent / "converted")
    given = [*_images(2, 40, 30), *_images(1, 28, 50, seed=1)]
    words = tokenizer(PROMPTS, padding="max_length", max_length=CLIP_TOKENS, truncation=True, return_tensors="pt")
    with torch.no_grad():
        pixels = torch.from_numpy(for_clip(given, 28).transpose(0, 3, 1, 2))
        images = model.get_image_features(pixels).pooler_output.numpy()
        texts = model.get_text_features(**words).pooler_output.numpy()
    assert clip.size == 24 and clip.images(given).dtype == clip.texts(PROMPTS).dtype == np.float32
    assert relative(clip.images(given), images) <= 1e-5
    assert relative(clip.texts(PROMPTS), texts) <= 1e-5
    cosines = (images * texts).sum(1) / np.linalg.norm(images, axis=1) / np.linalg.norm(texts, axis=1)
    score = clip_score(clip.images(given), clip.texts(PROMPTS))
    np.testing.assert_allclose(score, 100 * np.maximum(cosines, 0), rtol=1e-4, atol=1e-3)
    assert clip.cuts(PROMPTS)[:2] == ["", ""] and "digit" in clip.cuts(PROMPTS)[2]


def test_a_whole_clip_converts_with_the_tokenizer_beside_it_or_says_what_is_wrong(clip_release, tmp_path, capfd):
    folder, *_ = clip_release
    assert (folder.parent / "converted" / "tokenizer" / "merges.txt").is_file()
    with pytest.raises(ConvertedError, match="is not converted: make it with"):
        features.load_clip(folder)
    shutil.copytree(folder.parent / "converted", tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "tokenizer")
    with pytest.raises(ConvertedError, match="there is no tokenizer of CLIP"):
        features.load_clip(tmp_path / "bare")
    entries = json.loads((folder / "config.json").read_text())
    entries["vision_config"]["num_hidden_layers"] = 4
    shutil.copytree(folder, tmp_path / "cut")
    (tmp_path / "cut" / "config.json").write_text(json.dumps(entries))
    with pytest.raises(SystemExit):
        cli.run(convert.main, ["convert", f"--from={tmp_path}/cut", f"--to={tmp_path}/x"])
    assert "num_hidden_layers 4 of vision_config, but the checkpoint holds 3" in capfd.readouterr().err
