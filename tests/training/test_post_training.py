"""Post-training through the commands: train, resume, sample, convert."""

import json
import shutil

import numpy as np
import pytest

from shortcut_jax import Pipeline, convert, train
from shortcut_jax.config.checks import from_config
from shortcut_jax.config.resume import compare
from shortcut_jax.config.schema import to_dict
from shortcut_jax.errors import ConfigError
from shortcut_jax.formats.inference_checkpoint import OrbaxParams
from shortcut_jax.runtime.checkpoint import Checkpoints, stored_meta
from tests.conftest import train_on_one_device
from tests.helpers import BOTH_BLOCKS, POST_TRAINING, tiny_config

STILL = {"optimizer__learning_rate": 1e-30}
"""One program for all runs whose weights are to stay; --stop_at keeps the steps that its schedule is compiled with."""


@pytest.fixture(scope="module")
def other(tmp_path_factory, arguments):
    """A run of the same kind as the base with other weights: fewer steps of the same training."""
    workdir = tmp_path_factory.mktemp("other") / "run"
    train_on_one_device(arguments(workdir, "--stop_at=1", **BOTH_BLOCKS))
    return workdir


@pytest.fixture(scope="module")
def begun(tmp_path_factory, post_arguments):
    """The run of `distilled`, stopped after two of its four steps."""
    workdir = tmp_path_factory.mktemp("begun") / "run"
    train_on_one_device(post_arguments(workdir, "--stop_at=2"))
    return workdir


def _items(workdir, step=4):
    folder = workdir / "checkpoints" / str(step)
    return {p.name for p in folder.iterdir() if p.is_dir()}


def test_a_checkpoint_holds_the_adapters_and_says_where_the_base_is(distilled, trained):
    meta = stored_meta(distilled / "checkpoints")
    assert meta["base"]["path"] == str(trained) and len(meta["base"]["hash"]) == 16
    assert meta["base"]["preset"] == "tiny"
    assert {"params", "fast", "slow", "optimizer"} <= _items(distilled)
    size = lambda w: sum(p.stat().st_size for p in (w / "checkpoints").rglob("*") if p.is_file())
    assert size(distilled) < size(trained)
    assert "frozen/base/" in (distilled / "shardings.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"train": "all"}], ids=["lora", "all"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    distilled, begun, tmp_path, post_arguments, one_device, no_end, changes
):
    expected = distilled
    if changes:
        expected = tmp_path / "whole"
        assert train.main(post_arguments(expected, **changes)) == 0
        assert train.main(post_arguments(tmp_path / "run", "--stop_at=2", **changes)) == 0
    else:
        shutil.copytree(begun, tmp_path / "run")
    assert train.main(post_arguments(tmp_path / "run", **changes)) == 0
    one, two = (_stored(w) for w in (expected, tmp_path / "run"))
    assert one.keys() == two.keys()
    for path, value in one.items():
        np.testing.assert_array_equal(two[path], value, err_msg=path)
    assert stored_meta(expected / "checkpoints")["counters"] == stored_meta(tmp_path / "run/checkpoints")["counters"]


def _stored(workdir, step=4):
    folder = workdir / "checkpoints" / str(step)
    return {f"{item}/{k}": v for item in ("params", "fast", "slow") for k, v in OrbaxParams(folder, item).items()}


@pytest.fixture
def copied(begun, trained, tmp_path):
    """A run whose base has gone; a copy of the base stands elsewhere."""
    meta = json.loads((begun / "checkpoints/2/meta/metadata").read_text())
    shutil.copytree(begun, tmp_path / "run")
    shutil.copytree(trained, tmp_path / "base")
    meta["base"]["path"] = str(tmp_path / "gone")
    (tmp_path / "run/checkpoints/2/meta/metadata").write_text(json.dumps(meta))
    return tmp_path / "run", tmp_path / "base"


def test_a_base_that_moved_is_named_by_base_in_whatever_format(copied, post_arguments, one_device, tmp_path):
    workdir, base = copied
    with pytest.raises(ConfigError, match="the base has moved: name its new place with --base"):
        train.main(post_arguments(workdir, "--stop_at=3"))
    with pytest.raises(ConfigError, match="gone is not found: name its new place with --base"):
        Pipeline(workdir)
    # The same weights in another format are the same base.
    assert convert.main(["convert", f"--from={base}", f"--to={tmp_path}/converted"]) == 0
    assert train.main(post_arguments(workdir, f"--base={tmp_path}/converted", "--stop_at=3")) == 0
    assert stored_meta(workdir / "checkpoints")["base"]["path"] == str(tmp_path / "converted")


@pytest.mark.slow
def test_a_changed_base_is_refused_when_resumed_or_sampled(begun, other, tmp_path, post_arguments, one_device):
    with pytest.raises(
        ConfigError, match=r"has content [0-9a-f]{16}, but this run was trained on [0-9a-f]{16} \(then at"
    ):
        Pipeline(begun, base=other)
    shutil.copytree(begun, tmp_path / "run")
    with pytest.raises(ConfigError, match="the base has changed"):
        train.main(post_arguments(tmp_path / "run", f"--base={other}", "--stop_at=3"))


@pytest.mark.slow
def test_a_lora_is_where_training_goes_on_from(distilled, trained, tmp_path, post_arguments, one_device, capfd):
    ours, peft = tmp_path / "ours", tmp_path / "peft"
    assert train.main(post_arguments(ours, "--stop_at=1", init_from=str(distilled), **STILL)) == 0
    assert f"adapters start from {distilled}" in capfd.readouterr().err
    assert stored_meta(ours / "checkpoints")["base"] == stored_meta(distilled / "checkpoints")["base"]
    file = tmp_path / "lora.safetensors"
    assert convert.main(["convert", f"--from={distilled}", f"--to={file}", "--format=diffusers"]) == 0
    given = {"init_from": str(file), "base": str(trained)}
    assert train.main(post_arguments(peft, "--stop_at=1", **given, **STILL)) == 0
    expected = {k: v for k, v in _stored(distilled).items() if k.startswith("slow/")}
    for workdir in (ours, peft):
        params = _stored(workdir, 1)
        for path, value in expected.items():
            actual = params[path.replace("slow/", "params/", 1)]
            np.testing.assert_allclose(actual, value, rtol=1e-6, atol=1e-9, err_msg=path)


@pytest.mark.slow
def test_a_lora_teacher_is_a_second_set_of_adapters(distilled, trained, tmp_path, post_arguments, one_device):
    assert train.main(post_arguments(tmp_path / "run", "--stop_at=1", teacher_lora=str(distilled), **STILL)) == 0
    params = _stored(tmp_path / "run", 1)
    for path, value in _stored(distilled).items():
        if path.startswith("slow/"):
            np.testing.assert_allclose(params[path.replace("slow/", "params/", 1)], value, rtol=1e-6, atol=1e-9)
    # What is exported is relative to the bare base.
    assert stored_meta(tmp_path / "run/checkpoints")["base"]["path"] == str(trained)


@pytest.fixture(scope="module")
def lora_files(distilled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    assert convert.main(["convert", f"--from={distilled}", f"--to={folder}/all.safetensors", "--format=diffusers"]) == 0
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": ""}, "train=lora needs pretrained weights: set init_from"),
        ({"init_from": "/nowhere"}, "init_from=/nowhere is not found"),
        ({"model__double_blocks": 1}, "double_blocks: 2 -> 1"),
        ({"init_from": "LORA"}, "is a LoRA that does not know its base: name it with base"),
        ({"base": "TRAINED"}, "are two networks, but training starts from its base"),
        ({"lora__paths": "nothing"}, "lora.paths='nothing' matches no layer"),
        ({"ema__warmup_ratio": 0.5}, "ema.warmup_ratio is 0.5, but must be at least 1"),
        ({"init_from": "LORA", "base": "TRAINED", "lora__rank": 4}, r"has rank 3, but lora\.rank is 4"),
        ({"init_from": "LORA", "base": "TRAINED", "lora__paths": ".*qkv"}, r"adapts other layers than lora\.paths"),
        ({"teacher_lora": "LORA", "lora__paths": ".*qkv"}, "it also has double_blocks/img_attn_out"),
        ({"train": "all", "init_from": "LORA"}, "is a LoRA, but train=all"),
        ({"train": "all", "teacher_share": 0.0, "base": "TRAINED"}, "but nothing is frozen: set train=lora"),
        ({"jumps": 3}, "jumps is 3, but must be an even number"),
        ({"jumps": 64}, "teacher_grid is 32, but must be a multiple of jumps=64"),
        ({"jumps": 6}, "teacher_grid is 32, but must be a multiple of jumps=6"),
        ({"student_steps": "(1,2,32)"}, "student_steps has 32, whose targets take 64 steps"),
        ({"guidance": "(0.0,7.5)"}, "tiny has no guidance embedding to take it"),
        ({"guidance_mode": "cfg"}, "guidance_mode=cfg needs a range of scales"),
        (
            {"guidance_mode": "distill", "guidance": "(1.0,4.0)"},
            "guidance_mode=distill needs a guidance embedding: set model.guidance",
        ),
        ({"guidance_mode": "cfg", "guidance": "(1.0,4.0)", "model__guidance": True}, "set model.guidance=false"),
        ({"lora__paths": "*"}, r"lora\.paths is '\*', which is not a regular expression"),
        ({"lora__rank": 0}, r"lora\.rank is 0, but must be at least 1"),
        ({"objective": "shortcut", "teacher_share": 0.0}, "objective=shortcut has a step-size embedding"),
        ({"objective": "flow"}, "has no rows to learn from a teacher"),
    ],
)
def test_bad_input_is_one_clear_line_before_anything_is_compiled(
    changes, message, lora_files, trained, tmp_path, post_arguments, one_device
):
    places = {"LORA": str(lora_files / "all.safetensors"), "TRAINED": str(trained)}
    changes = {k: places.get(v, v) if isinstance(v, str) else v for k, v in changes.items()}
    argv = post_arguments(tmp_path / "run", **changes)
    argv = [a for a in argv if a != "--config.init_from="]
    with pytest.raises(ConfigError, match=message) as raised:
        train.main(argv)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_few_images_are_repeated_and_said(tmp_path, post_arguments, one_device, capfd):
    assert train.main(post_arguments(tmp_path / "run", "--stop_at=1", data__limit=10)) == 0
    assert "10 images for 32 rows a step: each is repeated, with noise of its own" in capfd.readouterr().err


@pytest.mark.slow
def test_the_teacher_is_trained_first_where_it_is_absent(tmp_path, data_dir, one_device, no_end, capfd):
    config = tmp_path / "config.py"
    config.write_text(
        "from tests.helpers import BOTH_BLOCKS, POST_TRAINING, tiny_config\n\n\n"
        "def get_config():\n"
        f"    return tiny_config(**POST_TRAINING | {{'init_from': {str(tmp_path / 'teacher')!r}}})\n\n\n"
        "def get_teacher_config():\n"
        "    return tiny_config(objective='flow', steps=2, data__caption_dropout=0.3)\n"
    )
    argv = ["train", f"--config={config}", f"--config.data.dir={data_dir}", f"--workdir={tmp_path}/run", "--stop_at=1"]
    assert train.main(argv) == 0
    told = capfd.readouterr().err
    assert f"init_from={tmp_path}/teacher is not found, or not finished: training the teacher first" in told
    assert max(Checkpoints(tmp_path / "teacher/checkpoints", read_only=True).steps()) == 2
    stored = stored_meta(tmp_path / "teacher/checkpoints")["config"]["data"]
    assert stored["caption_dropout"] == 0.3 and stored["dir"] == data_dir
    assert f"base: slow weights of step 2 in {tmp_path}/teacher" in told
    shutil.rmtree(tmp_path / "run")
    assert train.main(argv) == 0
    assert "training the teacher first" not in capfd.readouterr().err
    # A teacher that was interrupted before its first checkpoint is trained too.
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(tmp_path / "teacher/checkpoints")
    (tmp_path / "teacher/checkpoints/1.orbax-checkpoint-tmp").mkdir(parents=True)
    assert train.main(argv) == 0
    assert "or not finished: training the teacher first" in capfd.readouterr().err


def test_adapters_go_on_only_from_the_base_they_were_trained_on(distilled, other, tmp_path, post_arguments, one_device):
    for changes in (
        {"init_from": str(distilled), "base": str(other)},
        {"init_from": str(other), "teacher_lora": str(distilled)},
    ):
        with pytest.raises(ConfigError, match="was trained on a base with content"):
            train.main(post_arguments(tmp_path / "run", **changes))
        assert not (tmp_path / "run/checkpoints").exists() or not list((tmp_path / "run/checkpoints").iterdir())


@pytest.mark.slow
def test_the_teachers_adapters_may_move_but_not_change(distilled, tmp_path, post_arguments, one_device):
    first, moved, changed = (tmp_path / f"{name}.safetensors" for name in ("first", "moved", "changed"))
    for file, view in ((first, "slow"), (changed, "online")):
        argv = ["convert", f"--from={distilled}", f"--view={view}", f"--to={file}", "--format=diffusers"]
        assert convert.main(argv) == 0
    run = lambda file, stop: train.main(
        post_arguments(tmp_path / "run", f"--stop_at={stop}", teacher_lora=str(file), **STILL)
    )
    assert run(first, 1) == 0
    record = stored_meta(tmp_path / "run/checkpoints")["base"]
    assert record["teacher"] == str(first) and len(record["teacher_hash"]) == 16
    first.rename(moved)
    with pytest.raises(ConfigError, match="this run was trained with"):
        run(changed, 2)
    assert run(moved, 2) == 0
    assert stored_meta(tmp_path / "run/checkpoints")["base"]["teacher"] == str(moved)


@pytest.mark.slow
def test_the_report_judges_the_teacher_beside_the_student(tmp_path, post_arguments, one_device):
    changes = {"eval__views": "('teacher','slow')", "eval__images": "(20,20)"}
    assert train.main(post_arguments(tmp_path / "run", **changes)) == 0
    report = (tmp_path / "run/report.md").read_text()
    assert "| teacher (20)" in report and "| slow (20)" in report and "in adapters" in report


def test_a_base_given_by_a_relative_path_is_the_same_run_in_a_folder_that_has_moved(tmp_path, monkeypatch):
    """What is stored is what was given; where the base was is known from the checkpoint."""
    (tmp_path / "elsewhere" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    settings = from_config(tiny_config(**POST_TRAINING | {"init_from": "runs/teacher"}))
    assert settings.init_from == "runs/teacher"
    stored = to_dict(settings)
    monkeypatch.chdir(tmp_path)
    again = to_dict(from_config(tiny_config(**POST_TRAINING | {"init_from": "runs/teacher"})))
    assert not compare(stored, again)["identity"]
