"""Sets of latents, made of images or by a teacher, on the small random pipeline."""

import dataclasses
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from shortcut_jax import TextToImage, cli, convert, prepare
from shortcut_jax.core.latents import patchify, unpatchify
from shortcut_jax.data.format import VAE, LatentInfo, PreparedSet, SetInfo, TextInfo, unpack_text
from shortcut_jax.data.records import DataSettings
from shortcut_jax.data.training import open_set
from shortcut_jax.errors import ConvertedError, DataError, UsageError
from shortcut_jax.formats.inference_checkpoint import RECORD, Sampling
from shortcut_jax.formats.to_devices import place
from shortcut_jax.inference.encoders import load_decoder, load_text_encoder
from shortcut_jax.models.vae import Autoencoder
from shortcut_jax.preparation import inspect
from shortcut_jax.preparation.images import Cropped
from shortcut_jax.preparation.latents import LatentEncoder, as_half
from shortcut_jax.preparation.progress import summary
from shortcut_jax.sources import models
from shortcut_jax.sources.models import open_models
from shortcut_jax.weights.rules import nest
from tests.data.images import encoded, noise_image, write_folder
from tests.helpers import relative

CAPTIONS = ["a red cat", "a photo of the small dog and the cat", "seven"]
TOKENS = 12


@pytest.fixture(autouse=True)
def few_devices(monkeypatch):
    devices = jax.devices()[:2]
    monkeypatch.setattr(jax, "local_devices", lambda *args, **kwargs: devices)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    images = {f"{i:02d}.png": (encoded(noise_image(i, *SIZES[i % 2])), CAPTIONS[i % 3]) for i in range(12)}
    return write_folder(tmp_path_factory.mktemp("latents") / "source", images)


SIZES = ((32, 32), (16, 32))


def _arguments(source, checkpoint, out, **changes):
    options = {"source": source, "out": out, "store": "latents", "checkpoint": checkpoint, "buckets": "32x32,16x32"}
    options |= {"text_tokens": TOKENS, "validation": 0.3, "unit": 4, "batch": 1} | changes
    return ["prepare", *(f"--{name}={value}" for name, value in options.items())]


@pytest.fixture(scope="module")
def prepared(source, converted_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "set"
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:2]
        patch.setattr(jax, "local_devices", lambda *args, **kwargs: devices)
        assert prepare.main(_arguments(source, converted_folder, out)) == 0
    return out


@pytest.fixture(scope="module")
def pipeline(converted_folder):
    return TextToImage(converted_folder, devices=jax.devices()[:2])


@pytest.fixture(scope="module")
def autoencoder(converted_folder):
    """The module and its parameters, read without what is tested."""
    (model,) = (m for m in open_models(converted_folder) if m.kind == "vae")
    return Autoencoder(model.config), nest({k: np.asarray(model.params[k]) for k in model.params})


def _records(folder):
    prepared = PreparedSet(folder)
    return {r["key"].decode(): r for split in prepared.info.counts for r in prepared.records(split)}


def _bytes(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_records_hold_the_moments_and_states_of_the_models(prepared, pipeline, autoencoder):
    info, records = PreparedSet(prepared).info, _records(prepared)
    vae, params = autoencoder
    assert len(records) == 12 and info.latents == LatentInfo(16, 2, 0.3611, 0.1159)
    assert set(info.encoders) == {"vae", "t5", "clip"} and info.text == TextInfo(
        "full", "bfloat16", TOKENS, 32, 24, info.text.error, cut=0
    )
    for key, record in records.items():
        i = int(key[:2])
        x = jnp.asarray(noise_image(i, *SIZES[i % 2]), jnp.float32)[None] / 127.5 - 1
        moments = vae.apply({"params": params}, x, method="encode")
        assert relative(record["mean"].astype(np.float32), moments.mean_BhwC[0]) < 1e-3
        assert relative(record["std"].astype(np.float32), np.exp(moments.logvar_BhwC[0] / 2)) < 1e-3
        condition = pipeline.encode([CAPTIONS[i % 3]], text_tokens=TOKENS)
        assert relative(unpack_text(record, info.text).astype(np.float32), condition.txt_BMT[0]) < 4e-3
        assert relative(record["vec"], condition.vec_BV[0]) < 1e-5
        assert (record["height"], record["width"]) == SIZES[i % 2]
    assert 0 < info.text.error < 4e-3  # of bfloat16


def test_the_set_decodes_its_own_images(prepared, autoencoder):
    record = next(r for r in _records(prepared).values() if r["mean"].shape == (16, 16, 16))
    latents = (record["mean"].astype(np.float32)[None] - 0.1159) * 0.3611
    i = int(record["key"][:2])
    vae, params = autoencoder
    x = jnp.asarray(noise_image(i), jnp.float32)[None] / 127.5 - 1
    whole = np.asarray(vae.apply({"params": params}, x))
    expected = np.clip((whole + 1) * 127.5, 0, 255)
    decode = load_decoder(prepared / VAE)
    assert np.abs(decode(latents) - expected).max() <= 2
    many = decode(np.repeat(latents, 5, axis=0))
    assert many.shape == (5, 32, 32, 3) and many.dtype == np.uint8 and np.ptp(many.astype(int), axis=0).max() <= 1
    with pytest.raises(ConvertedError, match="nowhere is not found"):
        load_decoder(prepared / "nowhere")


def test_stored_prompts_are_those_of_the_text_encoders(prepared, converted_folder):
    prompts = PreparedSet(prepared).prompts()
    assert next(iter(prompts)) == "" and set(prompts) <= {"", *CAPTIONS} and len(prompts) > 1
    encode = load_text_encoder(converted_folder, TOKENS, "full")
    for caption, (txt_MT, vec_V) in prompts.items():
        own_txt_MT, own_vec_V = encode(caption)
        assert txt_MT.dtype == own_txt_MT.dtype == ml_dtypes.bfloat16
        assert relative(own_txt_MT.astype(np.float32), txt_MT.astype(np.float32)) < 4e-3
        np.testing.assert_allclose(own_vec_V, vec_V, atol=1e-5)


@pytest.mark.slow
def test_prepared_twice_or_killed_in_the_middle_is_the_same(source, prepared, converted_folder, tmp_path, capsys):
    assert prepare.main(_arguments(source, converted_folder, tmp_path / "set")) == 0
    assert _bytes(tmp_path / "set") == _bytes(prepared)
    assert prepare.main(_arguments(source, converted_folder, tmp_path / "set")) == 0
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"text_dtype: bfloat16 -> float8"):
        prepare.main(_arguments(source, converted_folder, tmp_path / "set", text_dtype="float8"))
    out = tmp_path / "killed" / "set"
    out.parent.mkdir()
    slow = (  # so that the signal meets the work
        "import sys, time, jax; from shortcut_jax import cli, prepare; from shortcut_jax.preparation import latents\n"
        "devices = jax.devices()[:2]; jax.local_devices = lambda *a, **k: devices\n"
        "half = latents.as_half\n"
        "latents.as_half = lambda *a: (time.sleep(0.1), half(*a))[1]\n"
        "cli.run(prepare.main, sys.argv[1:])"
    )
    argv = [sys.executable, "-c", slow, *_arguments(source, converted_folder, out)]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    work = out.parent / ".set.partial" / "work"
    while process.poll() is None and not list(work.glob("[0-9]*.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -9 and not out.exists()
    assert prepare.main(_arguments(source, converted_folder, out)) == 0
    assert "going on: " in capsys.readouterr().err
    assert _bytes(out) == _bytes(prepared)


@pytest.mark.parametrize("states", ["full", "trimmed"])
def test_float8_states_are_near_and_trimmed_ones_are_zero_behind_the_caption(states, converted_folder, pipeline):
    exact = LatentEncoder(converted_folder, states, TOKENS, "bfloat16", 1)
    small = LatentEncoder(converted_folder, states, TOKENS, "float8", 1)
    images = [Cropped(c, c, 16, 16, noise_image(i, 16, 16)) for i, c in enumerate(CAPTIONS[:2])]
    lengths = exact.text.t5_tokens(CAPTIONS[:2], TOKENS).length_B
    assert 4 <= lengths[0] < lengths[1] <= TOKENS
    wanted = np.array(pipeline.encode(CAPTIONS[:2], text_tokens=TOKENS).txt_BMT)
    for i, ((fields, _), (few, sums)) in enumerate(zip(exact(images), small(images), strict=True)):
        if states == "trimmed":
            wanted[i, lengths[i] :] = 0
            assert fields["txt"].shape == few["txt"].shape == (lengths[i], 32)
        txt_MT = unpack_text(few, small.text_info).astype(np.float32)
        assert relative(unpack_text(fields, exact.text_info).astype(np.float32), wanted[i]) < 4e-3
        assert 0.005 < relative(txt_MT, wanted[i]) < 0.03
        measured = np.sqrt(sums["error_square"] / sums["state_square"])
        assert relative(txt_MT, wanted[i]) == pytest.approx(measured, rel=0.05)
        np.testing.assert_array_equal(fields["mean"], few["mean"])


def test_captions_that_are_cut_are_counted(converted_folder, prepared, capsys):
    encoder = LatentEncoder(converted_folder, text_tokens=8, per_device=1)
    txt, vec = np.ones((3, 8, 32), np.float32), np.ones((3, 24), np.float32)
    counted = [sums["cut"] for _, sums in encoder.text_fields(CAPTIONS, txt, vec)]
    assert counted == [0.0, 1.0, 0.0]  # nine words and the end
    info = PreparedSet(prepared).info
    assert info.text.cut == 0 and not any("cut" in line for line in summary(info, prepared, 1.0))
    told = summary(dataclasses.replace(info, text=dataclasses.replace(info.text, cut=5)), prepared, 1.0)
    assert any(f"5 of 12 captions had more than {TOKENS} tokens of T5 and were cut" in line for line in told)


@pytest.mark.slow
def test_sampling_with_trimmed_states_is_that_with_zeros(converted_folder, pipeline, tmp_path, capfd):
    import json
    import shutil

    folder = tmp_path / "trimmed"
    shutil.copytree(converted_folder, folder)
    record = json.loads((folder / RECORD).read_text())
    del record["sampling"]["text_states"]  # as it was written before there were two kinds
    (folder / RECORD).write_text(json.dumps(record))
    assert TextToImage(folder).sampling.text_states == "full"
    record["sampling"]["text_states"] = "trimmed"
    (folder / RECORD).write_text(json.dumps(record))
    trimmed = TextToImage(folder, devices=jax.devices()[:2])
    full, cut = (p.encode(CAPTIONS[:2], text_tokens=TOKENS) for p in (pipeline, trimmed))
    zeroed = np.array(full.txt_BMT)
    for row, length in zip(zeroed, pipeline.text.t5_tokens(CAPTIONS[:2], TOKENS).length_B, strict=True):
        row[length:] = 0
    np.testing.assert_allclose(cut.txt_BMT, zeroed, atol=1e-6)
    noise = pipeline.draw_noise(0, 0, 2, 16, 16)
    sampled = trimmed.denoise(noise, cut, (16, 16), 2)
    assert relative(sampled, pipeline.denoise(noise, full._replace(txt_BMT=zeroed), (16, 16), 2)) < 1e-5
    assert relative(sampled, pipeline.denoise(noise, full, (16, 16), 2)) > 1e-3
    load = load_text_encoder(folder, TOKENS, "trimmed")(CAPTIONS[0])[0]
    length = pipeline.text.t5_tokens([CAPTIONS[0]]).length_B[0]
    assert length < TOKENS and not np.any(load[length:]) and np.all(np.any(load[:length] != 0, axis=1))
    record["sampling"].setdefault("spacing", {})["start"] = 0.98
    (folder / RECORD).write_text(json.dumps(record))
    assert convert.main(["convert", f"--from={folder}", f"--to={tmp_path}/d", "--format=diffusers"]) == 0
    told = capfd.readouterr().err
    assert "trimmed text states, but diffusers and ComfyUI" in told and "sigmas=[0.985, 0.75, 0.5, 0.25]" in told
    assert convert.main(["convert", f"--from={folder}", f"--to={tmp_path}/o"]) == 0
    told = capfd.readouterr().err
    assert "trimmed text states" not in told and "sigmas" not in told
    sampling = TextToImage(tmp_path / "o").sampling
    assert sampling.text_states == "trimmed" and sampling.spacing.start == 0.98


def test_the_text_states_of_a_run_go_into_what_is_converted(tmp_path, monkeypatch):
    data = {"text_encoder": "stored", "text_tokens": 40}
    config = {"guide": "told", "data": data}
    monkeypatch.setattr(models, "stored_meta", lambda folder: {"config": config})
    sampling = models.sampling_of(tmp_path, [])
    assert (sampling.text_tokens, sampling.text_states) == (40, "full")  # of a run from before there were two kinds
    data["text_states"] = "trimmed"
    assert models.sampling_of(tmp_path, []).text_states == "trimmed"
    data["text_encoder"] = "words"
    assert models.sampling_of(tmp_path, []) == Sampling(text_tokens=512)
    config["multistep_start"] = 0.99
    assert models.sampling_of(tmp_path, []).spacing.start == 0.99
    config["objective"] = "shortcut"  # which is told its step size
    assert models.sampling_of(tmp_path, []).spacing.start == 1.0


def _teacher(converted_folder, out, prompts, **changes):
    options = {"from_teacher": converted_folder, "prompts": prompts, "out": out, "buckets": "16x16,16x24"}
    options |= {"per_bucket": 3, "steps": 2, "text_tokens": TOKENS, "unit": 2, "validation": 0} | changes
    return ["prepare", *(f"--{name}={value}" for name, value in options.items())]


@pytest.mark.slow
def test_a_teachers_records_are_what_it_samples(converted_folder, pipeline, tmp_path, capfd):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\n\na photo of a small dog and the cat on the photo of a cat and the dog\n")
    assert prepare.main(_teacher(converted_folder, tmp_path / "set", prompts)) == 0
    err = capfd.readouterr().err
    assert "T5 reads 12 tokens of 'a photo" in err and "guidance 3.5: through the guidance embedding; 2 steps" in err
    info, records = PreparedSet(tmp_path / "set").info, _records(tmp_path / "set")
    assert sorted(records) == [f"{i:08d}" for i in range(6)] and info.counts == {"train": (3, 3)}
    assert set(info.encoders) == {"flux", "vae", "t5", "clip"}
    captions = prompts.read_text().split("\n\n")
    for i, record in enumerate(records[k] for k in sorted(records)):
        height, width = info.buckets[i // 3]
        caption = captions[i % 2].strip()
        assert record["caption"].decode() == caption and not record["std"].any()
        condition = pipeline.encode([caption], 3.5, TOKENS)
        expected = pipeline.denoise(pipeline.draw_noise(0, i, 1, height, width), condition, (height, width), 2)
        latents = (record["mean"].astype(np.float32) - info.latents.shift) * info.latents.scale
        assert relative(latents, expected[0]) < 2e-3
        assert relative(unpatchify(patchify(latents[None]), height // 2, width // 2)[0], latents) == 0
        assert relative(unpack_text(record, info.text).astype(np.float32), condition.txt_BMT[0]) < 4e-3
    assert prepare.main(_teacher(converted_folder, tmp_path / "again", prompts, batch=2, buckets="16x16")) == 0
    for key, record in _records(tmp_path / "again").items():  # whatever the batch
        assert relative(record["mean"].astype(np.float32), records[key]["mean"].astype(np.float32)) < 1e-3


def _captions(converted_folder, out, prompts, **changes):
    options = {"store": "captions", "prompts": prompts, "checkpoint": converted_folder, "out": out, "unit": 3}
    options |= {"text_tokens": TOKENS, "validation": 0} | changes
    return ["prepare", *(f"--{name}={value}" for name, value in options.items())]


@pytest.mark.slow
def test_captions_alone_are_stored_with_the_states_that_sampling_gives_them(converted_folder, tmp_path, capfd):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join([*CAPTIONS, "a red cat " * 20]) + "\n")
    assert prepare.main([*_captions(converted_folder, tmp_path / "set", prompts), "--resolution=32"]) == 0
    err = capfd.readouterr().err
    assert "reads 12 tokens of 'a red cat" in err and "unused with --store=captions: --resolution" in err
    prepared, captions = PreparedSet(tmp_path / "set"), prompts.read_text().splitlines()
    assert (prepared.info.store, prepared.info.text.cut) == ("captions", 1)
    assert set(prepared.info.encoders) == {"vae", "t5", "clip"} and (tmp_path / "set" / VAE).is_dir()
    records = _records(tmp_path / "set")
    assert [records[key]["caption"].decode().strip() for key in sorted(records)] == [c.strip() for c in captions]
    assert all(record.keys() == {"key", "caption", "txt", "txt_exponent", "vec"} for record in records.values())
    txt_BMT, vec_BV = TextToImage(converted_folder).text.encode(captions, TOKENS)
    for i, key in enumerate(sorted(records)):
        assert relative(unpack_text(records[key], prepared.info.text).astype(np.float32), txt_BMT[i]) < 4e-3
        assert relative(records[key]["vec"], vec_BV[i]) < 1e-5
    lines = inspect.inspect(tmp_path / "set", None)
    assert "store: captions" in lines and f"train: {len(captions)} records" in lines
    assert not any("originals" in line or "images:" in line for line in lines)
    with pytest.raises(UsageError, match="captions alone, which has no images to show"):
        inspect.inspect(tmp_path / "set", tmp_path / "x.png")
    with pytest.raises(DataError, match=r"holds captions, but data\.store is 'latents': set it to 'captions'"):
        open_set(DataSettings(dir=str(tmp_path), name="set", store="latents"), "set")


def test_bad_input_is_one_clear_line_before_weights_are_read(source, converted_folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("shortcut_jax.inference.encoders.place_on", lambda *args: pytest.fail("weights were read"))
    prompts, latin = tmp_path / "prompts.txt", tmp_path / "latin.txt"
    prompts.write_text("\n \n")
    latin.write_bytes(b"caf\xe9\n")
    out = tmp_path / "set"

    def fails(argv, text):
        with pytest.raises(SystemExit) as stop:
            cli.run(prepare.main, argv)
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert stop.value.code == 1 and text in line, line

    fails(_teacher(converted_folder, out, tmp_path / "no.txt"), "no.txt cannot be read")
    fails(_teacher(converted_folder, out, prompts), "has no caption: write one a line")
    fails(_teacher(converted_folder, out, latin), "latin.txt is not UTF-8: byte 3 is 0xe9")
    prompts.write_text("a cat\n")
    fails(_teacher(converted_folder, out, prompts, buckets="18x16"), "18 x 16, but both must be multiples of 4")
    fails(_teacher(converted_folder, out, prompts, steps=0), "steps is 0")
    fails(_teacher(converted_folder, out, prompts, per_bucket=0), "--per_bucket is 0")
    fails(_teacher(tmp_path / "no", out, prompts), "no is not found")
    fails([*_teacher(converted_folder, out, prompts), f"--source={source}"], "do not go with --from_teacher")
    fails(["prepare", f"--source={source}", f"--out={out}", "--store=latents"], "--checkpoint is missing")
    fails(_arguments(source, converted_folder, out, buckets="18x16"), "18x16 is not in multiples of 4; the nearest is")
    fails(_arguments(source, source, out), "is no converted folder")
    fails(_arguments(source, converted_folder, out, batch=0), "--batch is 0")
    captions = _captions(converted_folder, out, prompts)
    fails([flag for flag in captions if "checkpoint" not in flag], "--checkpoint is missing")
    fails([flag for flag in captions if "prompts" not in flag], "--prompts is missing")
    fails([*captions, f"--source={source}"], "--source does not go with --store=captions")
    fails(_teacher(converted_folder, out, prompts, store="captions"), "--store=captions has no images to sample")
    assert not out.exists()


def test_latents_beyond_float16_are_an_error():
    assert as_half(np.full(3, 65000.0, np.float32), "x").dtype == np.float16
    with pytest.raises(DataError, match="latents of x are not finite in float16"):
        as_half(np.array([1.0, 7e4], np.float32), "x")


def test_inspecting_tells_what_is_there_and_shows_it(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert prepare.main(["prepare", f"--inspect={prepared}"]) == 0
    out, info = capsys.readouterr().out, PreparedSet(prepared).info
    for line in (
        f"train: {info.num_records('train')} records",
        "  32x32: 6 (50.0%)",
        "  16x32: 6 (50.0%)",
        "height of originals: 16 to 32",
        "words of captions: 1 to 9",
        f"text: {TOKENS} tokens of 32, full states in bfloat16, rounding error 0.1",
        "latents: 16 channels, 2 pixels each",
        "made with t5: t5 of ",
        "GB a million records",
    ):
        assert line in out, line
    with Image.open("set-inspect.png") as page:
        assert page.width > 4 * 192 and np.asarray(page).std() > 20
    with pytest.raises(UsageError, match=r"name a \.png in a folder"):
        inspect.inspect(prepared, tmp_path / "no" / "x.png")
    with pytest.raises(DataError, match="is no prepared set"):
        inspect.inspect(tmp_path, tmp_path / "x.png")


def test_statistics_count_splits_buckets_captions_and_what_was_left_out():
    counts = {"train": (3, 5), "validation": (1, 1)}
    info = SetInfo("pixels", ((64, 64), (48, 80)), counts, {}, skipped={"corrupt": 2}, enlarged=1)
    sample = inspect.Sample([1, 2, 2, 40], [(10, 20), (30, 20), (50, 60), (70, 80)], [3, 3, 3, 17], of=8)
    lines = inspect.statistics(info, sample, 5_000)
    for line in ("train: 8 records", "validation: 2 records", "  64x64: 4 (40.0%)", "  48x80: 6 (60.0%)"):
        assert line in lines
    assert "of 4 records, drawn from 8 at random:" in lines and "skipped: 2 corrupt" in lines
    assert "height of originals: 10 to 70, median 40" in lines
    assert "disk: 0.0 MB, 500 bytes a record, 0.5 GB a million records" in lines
    words = inspect.histogram("words", sample.words)
    assert words[0] == "words: 1 to 40, median 2" and words[1].split()[:4] == ["1", "to", "5", "3"]
    assert sum(int(line.split()[3]) for line in words[1:]) == 4


def test_the_vae_folder_opens_as_any_checkpoint(prepared, converted_folder):
    (own,) = open_models(prepared / VAE)
    (source,) = (m for m in open_models(converted_folder) if m.kind == "vae")
    assert own.config == source.config and set(own.params) == set(source.params)
    for name in source.params:
        np.testing.assert_array_equal(own.params[name], source.params[name])
    assert place(own.params, {}) == {}
