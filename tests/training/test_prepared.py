"""Training on prepared sets."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.config.checks import from_config
from shortcut_jax.core.flow import interpolate, velocity_target
from shortcut_jax.core.latents import patchify
from shortcut_jax.core.types import Condition
from shortcut_jax.data.pipeline import BatchReader
from shortcut_jax.data.records import fold, to_latents
from shortcut_jax.data.training import TrainingData
from shortcut_jax.errors import ConfigError, UserError
from shortcut_jax.evaluation.validation import Validation
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.models.presets import PRESETS
from shortcut_jax.run.assembly import Assembly, text_encoder
from shortcut_jax.run.check_data import check_data, check_grid
from shortcut_jax.runtime.metrics import read_metrics
from shortcut_jax.steps.networks import make_velocity
from shortcut_jax.steps.validation_loss import RULES
from shortcut_jax.training import session
from tests.data.prepared import TEXT, write_small_set
from tests.helpers import noisy_state, tiny_config

COUNTS = (50, 70, 30, 50)
RGB = FluxConfig(1, 1, 32, 2, (4, 6, 6), 12, 16, 16)
STORED = FluxConfig(1, 1, 32, 2, (4, 6, 6), 16, TEXT.width, TEXT.pooled_width)


@pytest.fixture(scope="module", autouse=True)
def presets():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny-rgb", RGB)
        patch.setitem(PRESETS, "tiny-stored", STORED)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    write_small_set(folder / "pixels", "pixels", COUNTS, splits=("train", "validation"))
    write_small_set(folder / "latents", "latents", COUNTS)
    return folder


def _settings(folder, name="pixels", **changes):
    size = dict(data__name=name, data__dir=str(folder), data__height=16, data__width=16)
    if name == "latents":
        size |= dict(model__preset="tiny-stored", data__store="latents", data__stride=2, data__text_encoder="stored")
        size |= dict(data__text_tokens=TEXT.tokens)
    else:
        size |= dict(model__preset="tiny-rgb")
    return from_config(tiny_config(**{**size, "batch_size": 8, "steps": 24, **changes}))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """24 steps on four buckets with a validation at the end, on one device; the assembly and its workdir."""
    judged = dict(eval__views=("slow",), eval__images=(6,), eval__batch_size=4, eval__steps=(1,))
    settings = _settings(folder, validation__every=24, log_every=1, objective="flow", **judged)
    assembly = Assembly(settings, jax.devices()[:1])
    workdir = tmp_path_factory.mktemp("runs") / "run"
    assert session.train(assembly, workdir) == 0
    return assembly, workdir


@pytest.mark.slow
def test_a_step_is_compiled_exactly_once_for_each_bucket(run, folder):
    assembly, _ = run
    data = TrainingData(assembly.settings.data)
    assert data.num_records == 200 and len(data.buckets) == 4
    reader = BatchReader(data, None, np.arange(8), 8, assembly.settings.seed)
    assert {reader.schedule.entry(step).bucket for step in range(24)} == {0, 1, 2, 3}
    assert assembly.train_step._cache_size() == 4


def test_a_run_on_images_without_labels_leaves_a_report(run):
    _, workdir = run
    report = (workdir / "report.md").read_text()
    assert "| slow (6)" in report and "squared Frechet distance" in report and "support vector" not in report
    for name in ("loss.png", "samples/step_00000024.png"):
        assert f"]({name})" in report and (workdir / name).stat().st_size > 100


def test_all_micro_batches_of_a_step_are_of_one_bucket(folder):
    assembly = Assembly(_settings(folder, accumulate=2), jax.devices()[:1])
    for size in TrainingData(assembly.settings.data).buckets:
        jax.eval_shape(assembly.train_step, assembly.state_shapes, assembly.batch_shapes(size))


def test_a_resumed_run_equals_an_uninterrupted_one(run, folder, tmp_path):
    assembly, workdir = run
    assert session.train(assembly, tmp_path / "run", stop_at=7) == 0
    assert session.train(assembly, tmp_path / "run") == 0
    read = lambda folder: {k: row["loss"] for k, row in read_metrics(folder / "metrics.jsonl").items()}
    losses = read(workdir), read(tmp_path / "run")
    assert len(losses[0]) == 24 and losses[0] == losses[1]


def test_the_validation_loss_is_logged_by_its_rule_and_view(run):
    _, workdir = run
    last = read_metrics(workdir / "metrics.jsonl")[24]
    assert 0.5 < last["validation/mlperf/slow"] < 5
    times = [last[f"validation/mlperf/slow/t={t:g}"] for t in RULES["mlperf"]]
    assert np.isclose(np.mean(times), last["validation/mlperf/slow"])  # 200 images: 25 at each time


def _direct_loss(assembly, params, rule):
    """Sample by sample, from the records themselves."""
    s = assembly.settings
    data = TrainingData(dataclasses.replace(s.data, split="validation"))
    key, errors = jax.random.key(s.validation.seed), []
    encode = text_encoder(s, assembly.model)

    @partial(jax.jit, static_argnums=0)
    def error_of(size, params, x, noise, t, condition):
        velocity = make_velocity(assembly.model, *size)(params, condition)
        return jnp.mean(jnp.square(velocity(interpolate(x, noise, t), t, None) - velocity_target(x, noise)))

    for index in range(data.num_records):
        record = data.sets[0].records[index]
        x0 = patchify(fold(to_latents(record["image"]), 1)[None])
        noise = jax.random.normal(jax.random.fold_in(key, index), x0.shape[1:])[None]
        t = np.array([rule(index)], np.float32)
        txt, vec = encode(record["caption"].decode())
        condition = Condition(txt[None], vec[None])
        errors.append(float(error_of(record["image"].shape[:2], params, x0, noise, t, condition)))
    return np.mean(errors)


@pytest.mark.parametrize(
    ("rule", "time"), [("mlperf", lambda i: (i % 8) / 8), ("midpoints", lambda i: (2 * (i % 8) + 1) / 16)]
)
def test_validation_asks_each_image_at_its_own_fixed_time(folder, rule, time):
    settings = _settings(folder, validation__rule=rule, validation__every=1, validation__images=10)
    one = Assembly(settings, jax.devices()[:1])
    params = jax.device_get(noisy_state(one).params)
    values = Validation(one)(params, "loss")
    short = dataclasses.replace(one.settings, data=dataclasses.replace(settings.data, limit=10))
    one.settings = short
    np.testing.assert_allclose(values["loss"], _direct_loss(one, params, time), rtol=1e-5)


def test_the_validation_loss_does_not_depend_on_batch_or_mesh(folder):
    settings = _settings(folder, validation__every=1)
    one = Assembly(settings, jax.devices()[:1])
    params = jax.device_get(noisy_state(one).params)
    wide = dataclasses.replace(settings, batch_size=16, mesh=dataclasses.replace(settings.mesh, data=2, fsdp=2))
    wide = dataclasses.replace(wide, rows=dataclasses.replace(wide.rows, self_rows=1, flow_rows=1))
    many = Assembly(wide, jax.devices()[:4])
    np.testing.assert_allclose(
        list(Validation(one)(params, "loss").values()), list(Validation(many)(params, "loss").values()), rtol=1e-5
    )


@pytest.mark.slow
def test_stored_states_reach_the_step(folder):
    settings = _settings(folder, "latents")
    assembly = Assembly(settings, jax.devices()[:1])
    data = TrainingData(settings.data)
    check_data(settings, assembly.model, data)
    reader = BatchReader(data, None, np.arange(8), 8, 0)
    batch, size = reader(0), data.buckets[reader.schedule.entry(0).bucket]
    shapes = assembly.batch_shapes(size)
    for leaf, shape in zip(batch, shapes, strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
    _, metrics = assembly.train_step(assembly.init_state(), batch)
    assert np.isfinite(metrics["loss"])


def test_guidance_in_training_uses_the_stored_empty_caption(folder):
    settings = _settings(folder, "latents", guidance_mode="cfg", guidance=(1.0, 3.0))
    frozen = Assembly(settings, jax.devices()[:1]).init_state().frozen
    txt, vec = TrainingData(settings.data).prompts[""]
    np.testing.assert_array_equal(frozen.unconditional.txt_BMT[0], txt)
    np.testing.assert_array_equal(frozen.unconditional.vec_BV[0], vec)


def test_prompts_of_the_grid_need_not_be_among_those_of_the_validation_set(folder, tmp_path):
    write_small_set(tmp_path / "held_out", "latents", (8,), splits=("validation",))
    stored = json.loads((tmp_path / "held_out" / "set.json").read_text())
    (tmp_path / "held_out" / "set.json").write_text(json.dumps({**stored, "eval_prompts": ["a bird", "a fish"]}))
    own = dict(eval__captions=("a dog",), validation__every=1, validation__name=str(tmp_path / "held_out"))
    settings = _settings(folder, "latents", **own)
    check_grid(settings, TrainingData(settings.data))
    assert Validation(Assembly(settings, jax.devices()[:1])).num_images == 8


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("pixels", dict(data__height=32), r"holds images of 16 x 16, 8 x 24, .* set --config.data.height=16"),
        ("pixels", dict(model__preset="tiny"), r"images of 3 channels, but the preset 'tiny' takes 1"),
        ("pixels", dict(data__stride=2), r"images of 12 channels \(data.stride=2\)"),
        ("latents", dict(data__stride=4), "has 2 pixels a latent, but data.stride is 4: set data.stride=2"),
        ("latents", dict(data__text_tokens=9), "data.text_tokens is 9, but the set 'latents' was prepared with 6"),
        ("latents", dict(data__text_states="trimmed"), "data.text_states is 'trimmed', but .* prepared with 'full'"),
        (
            "latents",
            dict(eval__captions=("a cow",)),
            "'a cow', whose text states are not .* among its 2 prompts",
        ),
        ("latents", dict(validation__every=5), "has no split 'validation'"),
    ],
)
def test_a_set_that_does_not_fit_is_told_before_anything_is_compiled(folder, tmp_path, name, changes, message):
    settings = _settings(folder, name, **changes)
    with pytest.raises(UserError, match=message) as error:
        session.train(Assembly(settings, jax.devices()[:1]), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_latents_cannot_be_mixed_with_those_of_other_encoders(folder, tmp_path):
    write_small_set(tmp_path / "other", "latents", COUNTS)
    stored = json.loads((tmp_path / "other" / "set.json").read_text())
    stored["latents"]["shift"] = 0.2
    (tmp_path / "other" / "set.json").write_text(json.dumps(stored))
    settings = _settings(folder, "latents", data__mix=(str(tmp_path / "other"),))
    with pytest.raises(UserError, match=r"cannot be mixed: .*shift=0.1.*shift=0.2"):
        TrainingData(settings.data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(data__weights=(1.0,), data__mix=("a",)), "must be a positive number for each of pixels, a"),
        (dict(data__mix=("pixels",)), "named twice"),
        (dict(data__store="latents", data__flip=0.5, data__text_encoder="stored"), "latents cannot be mirrored"),
        (dict(validation__rule="best"), "validation.rule is 'best', but must be one of mlperf, midpoints"),
        (dict(validation__views=("median",)), "validation.views is 'median'"),
        (dict(data__threads=0), "data.threads is 0"),
        (dict(data__stride=3), "not a multiple of the 3 pixels of a latent"),
    ],
)
def test_settings_that_cannot_be_are_told(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        _settings(folder, **changes)
