"""From captioned images to latents, to a trained model, to images of it: nothing between them is made up."""

import json

import numpy as np
import pytest
from PIL import Image

from shortcut_jax import Pipeline, evaluate, prepare
from shortcut_jax.config.checks import from_config
from shortcut_jax.data.format import VAE, PreparedSet
from shortcut_jax.data.training import TrainingData
from shortcut_jax.errors import ConfigError, UserError
from shortcut_jax.inference.codec import sampling_codec, training_codec
from shortcut_jax.inference.encoders import load_decoder
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.models.presets import PRESETS
from shortcut_jax.run.assembly import Assembly
from shortcut_jax.runtime.checkpoint import stored_config
from shortcut_jax.runtime.metrics import read_metrics
from shortcut_jax.training import session
from tests.data.images import encoded, noise_image, write_folder
from tests.helpers import tiny_config

CAPTIONS = ("a red cat", "a photo of the small dog", "seven", "green")
TOKENS = 12


@pytest.fixture(scope="module", autouse=True)
def one(one_device_of_module):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny-flux", FluxConfig(1, 1, 32, 2, (4, 6, 6), 64, 32, 24))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("latent_training")


@pytest.fixture(scope="module")
def prepared(folder, converted_folder):
    sizes = ((32, 32), (16, 32))
    images = {f"{i:02d}.png": (encoded(noise_image(i, *sizes[i % 2])), CAPTIONS[i % 4]) for i in range(24)}
    source = write_folder(folder / "source", images)
    options = dict(source=source, out=folder / "set", store="latents", checkpoint=converted_folder, validation=0.3)
    options |= dict(buckets="32x32,16x32", text_tokens=TOKENS)
    assert prepare.main(["prepare", *(f"--{name}={value}" for name, value in options.items())]) == 0
    return folder / "set"


def _settings(prepared, **changes):
    data = dict(data__name=str(prepared), data__store="latents", data__stride=2, data__text_encoder="stored")
    size = dict(data__height=32, data__width=32, data__text_tokens=TOKENS)
    return from_config(tiny_config(**{**data, **size, "model__preset": "tiny-flux", "batch_size": 8, **changes}))


@pytest.fixture(scope="module")
def trained_on_latents(folder, prepared):
    workdir = folder / "run"
    assert (
        session.train(Assembly(_settings(prepared, validation__every=4, log_every=1, objective="flow")), workdir) == 0
    )
    return workdir


@pytest.mark.slow
def test_the_run_learns_validates_and_draws_its_grid_with_the_sets_own_decoder(trained_on_latents):
    metrics = read_metrics(trained_on_latents / "metrics.jsonl")
    assert all(np.isfinite(metrics[step]["loss"]) for step in range(1, 5))
    assert np.isfinite(metrics[4]["validation/mlperf/slow"])
    with Image.open(trained_on_latents / "samples" / "step_00000004.png") as grid:
        assert grid.size[0] > 4 * 32 and np.asarray(grid).std() > 0
    assert stored_config(trained_on_latents / "checkpoints")["data"]["text_states"] == "full"


def test_training_decodes_latents_with_the_autoencoder_of_the_set(prepared):
    settings = _settings(prepared)
    codec = training_codec(settings, Assembly(settings).model, TrainingData(settings.data))
    latents = np.random.default_rng(0).standard_normal((2, 16, 16, 16)).astype(np.float32)
    np.testing.assert_array_equal(codec.decode(latents), load_decoder(prepared / VAE)(latents))
    with pytest.raises(ConfigError, match="no text states of 'a whale': choose among its"):
        codec.encode("a whale")


def test_a_run_is_sampled_with_its_sets_prompts_or_with_a_pipelines_encoders(trained_on_latents, converted_folder):
    prompt = PreparedSet(trained_on_latents.parent / "set").info.eval_prompts[0]
    stored = Pipeline(trained_on_latents)(prompt, steps=2, num=2)
    assert stored.shape == (2, 32, 32, 3) and stored.dtype == np.uint8
    encoded_now = Pipeline(trained_on_latents, encoders=converted_folder)
    assert np.abs(encoded_now(prompt, steps=2, num=2).astype(int) - stored).max() <= 2
    assert encoded_now("a whale with green", steps=2, num=2).shape == stored.shape


@pytest.mark.slow
def test_a_run_is_evaluated_with_its_stored_states_and_a_pipeline_teaches_it_on_the_same_captions(
    trained_on_latents, converted_folder, tmp_path
):
    argv = ["evaluate", f"--workdir={trained_on_latents}", f"--out={tmp_path}", "--views=slow", "--steps=1"]
    argv += [f"--teacher={converted_folder}", "--teacher_steps=2"]
    assert evaluate.main([*argv, "--images=4", "--batch_size=8", "--features=random", "--extras=validation"]) == 0
    record = json.loads((tmp_path / "evaluation.json").read_text())
    teacher, cell = record["cells"]
    assert (teacher["label"], teacher["steps"], teacher["images"]) == ("teacher", 2, 4)
    assert cell["abs_frechet_gap"] == pytest.approx(abs(cell["frechet_distance"] - teacher["frechet_distance"]))
    assert cell["frechet_to_teacher"] > 0 and "abs_frechet_gap" not in teacher
    assert np.isfinite(cell["frechet_distance"]) and cell["images"] == 4 and cell["accuracy"] is None
    # The run's own validation set, the same as in training.
    logged = read_metrics(trained_on_latents / "metrics.jsonl")[4]["validation/mlperf/slow"]
    assert record["validation"]["slow"]["mlperf loss"] == pytest.approx(logged, rel=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_from_stored_captions_alone(trained_on_latents, converted_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS) + "\n")
    options = dict(store="captions", prompts=tmp_path / "prompts.txt", out=tmp_path / "set")
    options |= dict(checkpoint=converted_folder, text_tokens=TOKENS, validation=0)
    assert prepare.main(["prepare", *(f"--{name}={value}" for name, value in options.items())]) == 0
    rows = dict(rows__self_rows=0, rows__flow_rows=0, rows__rolled_rows=1, init_from=str(trained_on_latents))
    settings = _settings(tmp_path / "set", data__store="captions", log_every=1, steps=2, **rows)
    assert session.train(Assembly(settings), tmp_path / "run") == 0
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(metrics[step]["loss/rolled"] == metrics[step]["loss"] > 0 for step in (1, 2))
    with Image.open(tmp_path / "run" / "samples" / "step_00000002.png") as grid:  # by the set's own decoder
        assert grid.size[0] > 4 * 32 and np.asarray(grid).std() > 0


def test_encoders_give_the_states_that_the_set_has_stored(prepared, converted_folder):
    settings = _settings(prepared)
    assembly, data = Assembly(settings), TrainingData(settings.data)
    network = assembly.settings, assembly.model
    stored, now = training_codec(*network, data), sampling_codec(*network, converted_folder)
    prompt, other = data.info.eval_prompts[0], "a whale with green"
    for a, b, c in zip(stored.encode(prompt), now.encode(prompt), now.encode(other), strict=True):
        a, b, c = (np.asarray(x, np.float32) for x in (a, b, c))
        np.testing.assert_allclose(a, b, atol=1e-2 * np.abs(a).max())
        assert np.abs(a - c).max() > 0.1 * np.abs(a).max()


def test_sampling_without_the_set_asks_for_encoders(trained_on_latents, prepared, monkeypatch):
    monkeypatch.setattr("shortcut_jax.inference.codec.is_prepared", lambda folder: False)
    with pytest.raises(UserError, match="is not here: name the pipeline that made them with --encoders"):
        Pipeline(trained_on_latents)
