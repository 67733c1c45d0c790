import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from shortcut_jax import cli, evaluate
from shortcut_jax.errors import UsageError
from shortcut_jax.evaluation import set_network
from shortcut_jax.evaluation.subjects import RunSubject
from tests.evaluation import test_features as judges
from tests.processes import start

EIGHT_DEVICES = jax.devices()
inception_folder, clip_release = judges.inception_folder, judges.clip_release
ARGUMENTS = ["--steps=1,2", "--other_steps=2", "--images=40", "--other_images=16", "--batch_size=16"]


def _argv(workdir, out, data_dir, *extra):
    """The arguments above, and others in their place."""
    given = {flag.split("=")[0] for flag in extra}
    kept = [flag for flag in ARGUMENTS if flag.split("=")[0] not in given]
    return [f"--workdir={workdir}", f"--out={out}", f"--data_dir={data_dir}", *kept, *extra]


def _evaluate(workdir, out, data_dir, *extra):
    assert evaluate.main(["evaluate", *_argv(workdir, out, data_dir, *extra)]) == 0
    return json.loads((out / "evaluation.json").read_text())


def _cells(record, *names):
    return {
        (c["label"], c["steps"]): [c[n] for n in names or ("frechet_distance", "accuracy")] for c in record["cells"]
    }


@pytest.fixture(scope="module")
def evaluated(trained, data_dir, made_once, one_device_of_module):
    """The folder of an uninterrupted evaluation of the small run."""
    return made_once("evaluated", lambda folder: _evaluate(trained, folder, data_dir))


@pytest.mark.slow
def test_views_steps_and_what_is_asked_besides(evaluated):
    record = json.loads((evaluated / "evaluation.json").read_text())
    images = {(c["label"], c["steps"]): c["images"] for c in record["cells"]}
    assert images == {("slow", 1): 40, ("slow", 2): 40, ("online", 2): 16, ("fast", 2): 16}
    assert all(np.isfinite(c["frechet_distance"]) and 0 <= c["accuracy"] <= 1 for c in record["cells"])
    assert (
        all(c["few_images"] for c in record["cells"]) and "fewer images" in (evaluated / "evaluation.html").read_text()
    )
    assert set(record["paths"]) == {"times", "slow", "online", "fast"}
    assert len(record["paths"]["slow"]["change"]) == len(record["paths"]["times"]) == 31
    assert len(record["paths"]["slow"]["consistency"]) == 5
    losses = record["validation"]["slow"]
    (whole,) = [name for name in losses if "/" not in name]
    assert whole == "mlperf loss (training images)" and len(losses) == 9
    assert set(record["latency_seconds"]) == {"slow"}
    assert {p.name for p in evaluated.iterdir()} >= {"evaluation.html", "evaluation.json", "tensorboard", "cells"}


@pytest.mark.slow
def test_the_network_of_the_set_gives_features_and_classes(
    evaluated, trained, data_dir, tmp_path, monkeypatch, capfd, one_device
):
    monkeypatch.setattr(set_network, "STEPS", 5)
    (in_pixels,) = (
        cell["frechet_distance"]
        for cell in json.loads((evaluated / "evaluation.json").read_text())["cells"]
        if cell["label"] == "slow" and cell["steps"] == 2
    )
    for out in ("a", "b"):
        record = _evaluate(trained, tmp_path / out, data_dir, *SAMPLES_ONLY, "--features=network")
        (cell,) = record["cells"]
        assert cell["frechet_distance_pixels"] == pytest.approx(in_pixels, rel=1e-6) != cell["frechet_distance"]
        assert np.isfinite(cell["frechet_distance"]) and 0 <= cell["accuracy"] <= 1
        page = (tmp_path / out / "evaluation.html").read_text()
        assert "network of the set" in page and "Frechet distance (pixels)" in page
    assert capfd.readouterr().err.count("training the network of the set: 1,797 images of 10 classes") == 1
    with pytest.raises(UsageError, match="--features=network is for a workdir"):
        evaluate.own_network(None, tmp_path)


def test_a_run_on_ten_images_is_judged_by_the_whole_set(trained, data_dir, tmp_path, one_device):
    workdir = shutil.copytree(trained, tmp_path / "run")
    stored = workdir / "checkpoints" / "4" / "meta" / "metadata"
    meta = json.loads(stored.read_text())
    meta["config"]["data"]["limit"] = 10
    stored.write_text(json.dumps(meta))
    subject = RunSubject(str(workdir), 1, 8, data_dir=data_dir)
    assert len(subject) == 1797 and "; 10 of them were trained on" in subject.facts["data"]


SAMPLES_ONLY = ("--extras=", "--views=slow", "--steps=2")


@pytest.mark.slow
def test_two_processes_and_eight_devices_say_the_same(evaluated, trained, data_dir, tmp_path, monkeypatch):
    want = json.loads((evaluated / "evaluation.json").read_text())
    argv = lambda out: ["-m", "shortcut_jax.evaluate", *_argv(trained, tmp_path / out, data_dir, *SAMPLES_ONLY)]
    together = start(2, argv("two"), devices=1)
    for name in ("devices", "local_devices"):
        monkeypatch.setattr(jax, name, lambda *args, **options: EIGHT_DEVICES)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert evaluate.main(argv("eight")[1:]) == 0
    for process in together:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    for name in ("two", "eight"):
        got = json.loads((tmp_path / name / "evaluation.json").read_text())
        names = ("frechet_distance", "kid", "accuracy", "images")
        found = _cells(got, *names)
        # Other programs round otherwise, and a pixel's value with it.
        np.testing.assert_allclose(found["slow", 2], _cells(want, *names)["slow", 2], rtol=2e-3, atol=1e-3)
        assert "2 x cpu" in got["facts"]["made"] or "8 x cpu" in got["facts"]["made"]


KILLED = """
import os, signal, sys
from shortcut_jax import evaluate
from shortcut_jax.evaluation import sampling

sampling.SAVE_SECONDS = 0.0
count, add = 0, sampling.add

def killed(*args):
    global count
    count += 1
    if count == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return add(*args)

sampling.add = killed
evaluate.main(["evaluate", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_what_was_killed_goes_on_where_it_was(
    evaluated, trained, data_dir, tmp_path, monkeypatch, one_device_of_module
):
    argv = _argv(trained, tmp_path, data_dir, *SAMPLES_ONLY)
    flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"}
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, *argv], env={**os.environ, **flags}, stderr=subprocess.DEVNULL
    )
    assert ended.returncode == -signal.SIGKILL and not (tmp_path / "evaluation.json").exists()
    # Of 40 images in batches of 16, the first 16 are on the disk.
    made = []
    images = RunSubject.images

    def counted(self, weights, asked, steps, seed, first):
        made.append((steps, first))
        return images(self, weights, asked, steps, seed, first)

    monkeypatch.setattr(RunSubject, "images", counted)
    got = _evaluate(trained, tmp_path, data_dir, *SAMPLES_ONLY)
    assert [m for m in made if m[0] == 2] == [(2, 16), (2, 32)]
    want = json.loads((evaluated / "evaluation.json").read_text())
    np.testing.assert_allclose(_cells(got)["slow", 2], _cells(want)["slow", 2], rtol=1e-6)
    made.clear()
    assert _cells(_evaluate(trained, tmp_path, data_dir, *SAMPLES_ONLY)) == _cells(got)
    assert {n for n, _ in made} == {1}  # to compile; nothing was sampled anew


@pytest.mark.slow
def test_adapters_are_judged_against_their_teacher(distilled, data_dir, tmp_path, one_device_of_module):
    extra = ("--views=slow", "--teacher_steps=2", "--images=16", "--extras=")
    record = _evaluate(distilled, tmp_path, data_dir, *extra)
    cells = {(c["label"], c["steps"]): c for c in record["cells"]}
    assert set(cells) == {("teacher", 2), ("slow", 1), ("slow", 2)}
    teacher = cells["teacher", 2]["frechet_distance"]
    for steps in (1, 2):
        cell = cells["slow", steps]
        assert cell["abs_frechet_gap"] == pytest.approx(abs(cell["frechet_distance"] - teacher))
        assert cell["frechet_to_teacher"] > 0
    assert "abs_frechet_gap" not in cells["teacher", 2]


@pytest.mark.parametrize(
    ("argv", "pattern"),
    [
        ([], "give one of --workdir and --checkpoint"),
        (["--workdir=x", "--checkpoint=y"], "give one of --workdir and --checkpoint"),
        (["--workdir=x", "--steps=0"], "--steps=0, but must be whole numbers from 1 to 1000"),
        (["--workdir=x", "--extras=speed"], "--extras has 'speed', but must be of grid, field, validation, latency"),
        (["--workdir=x", "--images=1"], "a distance needs at least 2 images"),
        (["--workdir=x", "--prompts=p"], "--prompts goes with --checkpoint"),
        (["--workdir=x", "--lora=l"], "--lora goes with --checkpoint, not with --workdir"),
        (["--checkpoint=x", "--prompts=p", "--lora=l", "--lora_scale=1", "--lora_scale=2"], "give one for each"),
        (["--checkpoint=x", "--prompts=none.txt"], "/none.txt cannot be read: No such file"),
        (["--checkpoint=x"], "--checkpoint needs --prompts=FILE"),
        (["--workdir=x", "--features=inception"], "convert pt_inception-2015-12-05 with"),
        (["--workdir=a", "--workdir=b"], "several workdirs need --out"),
        (["--workdir=nowhere"], "/nowhere/checkpoints: train first"),
        (["--save_reference=x.npz"], "--save_reference goes with --reference=FOLDER"),
    ],
)
def test_bad_input_is_one_clear_line(argv, pattern, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.run(evaluate.main, ["evaluate", *argv])
    assert stop.value.code == 1
    lines = capfd.readouterr().err.strip().splitlines()
    assert pattern in lines[-1] and lines[-1].startswith("error: ")


def test_a_view_that_is_not_there_and_a_reference_that_is_not(trained, data_dir, tmp_path, capfd, one_device_of_module):
    for extra, pattern in (
        ("--views=teacher", "has no view 'teacher': it has online, fast, slow"),
        ("--reference=none.npz", "are not found: make them with"),
    ):
        with pytest.raises(SystemExit):
            argv = ["evaluate", f"--workdir={trained}", f"--out={tmp_path}", f"--data_dir={data_dir}", *ARGUMENTS]
            cli.run(evaluate.main, [*argv, extra])
        assert pattern in capfd.readouterr().err


@pytest.mark.slow
def test_a_converted_pipeline_is_judged_on_a_file_of_prompts_against_a_folder(
    converted_folder,
    inception_folder,
    clip_release,
    tmp_path,
    one_device_of_module,
):
    (tmp_path / "real").mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / "real" / f"{i}.png")
    (tmp_path / "prompts.txt").write_text("a red fox\n\na lighthouse\na bowl\n")
    argv = [f"--checkpoint={converted_folder}", f"--prompts={tmp_path / 'prompts.txt'}", "--height=32", "--width=32"]
    argv += [f"--reference={tmp_path / 'real'}", f"--out={tmp_path / 'out'}", "--steps=1,2", "--batch_size=2"]
    clip = clip_release[0].parent / "converted"
    argv += [f"--inception={inception_folder}", f"--clip={clip}", "--extras=grid"]
    assert evaluate.main(["evaluate", *argv]) == 0
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert record["distance"] == "Frechet distance (InceptionV3 of 1/16 width)"
    assert all(0 <= c["clip_score"] <= 100 and c["few_images"] for c in record["cells"])
    assert [(c["label"], c["steps"], c["images"]) for c in record["cells"]] == [("checkpoint", n, 3) for n in (1, 2)]
    assert all(np.isfinite(c["frechet_distance"]) for c in record["cells"]) and set(record["paths"]) == {"times"}
    assert record["facts"]["prompts"] == "3, images of 32 x 32"
    assert "Samples of checkpoint" in (tmp_path / "out" / "evaluation.html").read_text()
