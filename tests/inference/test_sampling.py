"""The sample command beyond a contact sheet: prompts, seeds, metadata, the prompt line, trajectories, edits."""

import json
import shutil
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from shortcut_jax import Pipeline, cli, sample
from shortcut_jax.core.schedules import Spacing
from shortcut_jax.errors import CheckpointError, ConversionError, UsageError
from shortcut_jax.formats.inference_checkpoint import OrbaxParams
from shortcut_jax.inference.generator import Generator
from shortcut_jax.inference.image_files import Output, layout_of, parameters, read_records
from shortcut_jax.inference.repl import interact
from shortcut_jax.inference.request import SampleRequest, grid_times
from shortcut_jax.inference.run_prompts import known_words, unknown_words
from shortcut_jax.run.start_from import Initial
from shortcut_jax.run.workdir import restore_or_init
from shortcut_jax.runtime.checkpoint import Checkpoints
from shortcut_jax.weights.rules import nest
from tests.helpers import BOTH_BLOCKS, noisy_state, tiny_assembly

pytestmark = pytest.mark.usefixtures("one_device")

SEVEN, TWO = "a handwritten digit seven", "a handwritten digit two"


def _run(*argv):
    assert sample.main(["sample", *argv]) == 0


def _fails(capfd, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.run(sample.main, ["sample", *argv])
    assert stop.value.code == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def _pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_view_that_is_not_finite_is_refused_by_name_before_sampling(trained, tmp_path, capfd):
    run = shutil.copytree(trained, tmp_path / "run")
    stored = OrbaxParams(run / "checkpoints" / "4", "slow")
    slow = {path: np.zeros(stored.spec(path).shape, np.float32) for path in stored}
    slow["img_in/bias"] += np.nan
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(run / "checkpoints" / "4" / "slow", nest(slow), force=True)
    line = _fails(capfd, f"--workdir={run}", f"--prompt={TWO}", f"--out={tmp_path}/two.png")
    assert f"slow weights of step 4 in {run}: img_in/bias has values that are NaN or infinite in float32" in line
    assert not (tmp_path / "two.png").exists()
    Pipeline(run, "fast")  # whose weights are sound
    assembly = tiny_assembly(student_steps=(1, 2, 4), **BOTH_BLOCKS)
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    with pytest.raises(ConversionError, match=r"checkpoints/4 \(remove it .*: slow/img_in/bias has values"):
        restore_or_init(assembly, checkpoints, Initial())


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """What a file of two prompts leaves in a folder, two images of each."""
    with pytest.MonkeyPatch.context() as patch:
        import jax

        device = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *args: device)
        folder = tmp_path_factory.mktemp("sampled")
        (folder / "prompts.txt").write_text(f"\n{SEVEN}\n   \nein Bär\n", encoding="utf-8-sig")
        options = ["--num=2", "--steps=2", "--seed=5", "--guidance=2", "--shift=1.5", "--view=fast", "--trajectory"]
        _run(f"--workdir={trained}", f"--prompts={folder / 'prompts.txt'}", *options, f"--out={folder}/out/")
    return folder / "out"


def test_a_folder_gets_an_image_a_file_and_a_sheet_with_what_they_were_made_by(folder):
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [f"0000{i}{kind}.png" for i in range(4) for kind in ("", "_trajectory")] + ["sheet.png"]
    )
    made = [read_records(folder / f"0000{i}.png") for i in range(4)]
    assert [len(m) for m in made] == [1] * 4
    expected = [(SEVEN, 5, 0), (SEVEN, 5, 1), ("ein Bär", 5, 2), ("ein Bär", 5, 3)]
    assert [(m["prompt"], m["seed"], m["index"]) for (m,) in made] == expected
    told = dict(steps=2, method="euler", guidance=2.0, shift=1.5, height=8, width=8, view="fast", checkpoint_step=4)
    assert {k: made[0][0][k] for k in told} == told and made[0][0]["objective"] == "scfm"
    assert read_records(folder / "sheet.png") == [m for (m,) in made]
    with Image.open(folder / "00002.png") as image:
        lines = image.text["parameters"].splitlines()
    assert lines[0] == "ein Bär"
    assert lines[1].startswith("Steps: 2, Sampler: Euler, CFG scale: 2.0, Seed: 5, Size: 8x8, Model: run, Shift: 1.5, ")


def test_the_same_pixels_come_back_from_the_metadata(folder, trained):
    for name in ("00000.png", "00003.png"):
        (made,) = read_records(folder / name)
        pipeline = Pipeline(trained, view=made["view"], batch_size=made["batch_size"])
        options = dict(draws=[(made["seed"], made["index"])], method=made["method"], shift=made["shift"])
        again = pipeline(made["prompt"], made["steps"], guidance=made["guidance"], **options)
        np.testing.assert_array_equal(again[0, ..., 0], _pixels(folder / name))


def test_values_with_commas_are_quoted_as_readers_of_parameters_expect():
    made = dict(prompt="x", steps=1, method="heun", guidance=1.0, seed=0, width=8, height=8, shift=1.0, version="0")
    assert "Sampler: Heun, " in parameters([{**made, "model": "a, b"}])
    assert 'Model: "a, b", ' in parameters([{**made, "model": "a, b"}])


def test_a_trajectory_ends_in_the_image_and_names_its_times(folder, trained):
    pipeline = Pipeline(trained, view="fast", batch_size=4)
    options = dict(steps=2, num=2, seed=5, guidance=2.0, shift=1.5)
    along, images = pipeline.trajectory(SEVEN, **options), pipeline(SEVEN, **options)
    assert along.shape == (2, 3, 8, 8, 1)
    np.testing.assert_array_equal(along[:, -1], images)
    assert not np.array_equal(along[:, 0], along[:, 1])
    np.testing.assert_array_equal(images[0, ..., 0], _pixels(folder / "00000.png"))
    with Image.open(folder / "00000_trajectory.png") as strip:
        assert strip.width > 3 * 48 and json.loads(strip.text["shortcut_jax"])["pictures"]


def test_a_request_names_the_view_it_is_answered_with(trained):
    pipeline = Pipeline(trained, batch_size=4)
    rows = (request := SampleRequest((SEVEN,), num=2, steps=2, view="fast")).rows
    np.testing.assert_array_equal(pipeline.images(rows, request), Pipeline(trained, "fast", batch_size=4)(SEVEN, 2, 2))
    with pytest.raises(UsageError, match="lora_scale is for runs that trained adapters"):
        pipeline.check(SampleRequest((SEVEN,), lora_scale=0.5))


def test_every_seed_of_a_list_gives_the_image_it_gives_alone(trained, tmp_path):
    argv = [f"--workdir={trained}", f"--prompt={TWO}", "--steps=2", f"--out={tmp_path}/"]
    _run(*argv, "--seeds=7,3,7,4294967295")
    together = [_pixels(tmp_path / f"0000{i}.png") for i in range(4)]
    np.testing.assert_array_equal(together[0], together[2])
    pipeline = Pipeline(trained, batch_size=4)
    for seed, image in zip((7, 3, 7, 4294967295), together, strict=True):
        np.testing.assert_array_equal(pipeline(TWO, steps=2, seed=seed)[0, ..., 0], image)
    assert [read_records(tmp_path / f"0000{i}.png")[0]["seed"] for i in range(4)] == [7, 3, 7, 4294967295]
    with pytest.raises(ValueError, match="there are 1 draws for 2 images"):
        pipeline([TWO, SEVEN], draws=[(0, 0)])


def test_heun_is_another_way_to_the_image_and_says_so(trained, tmp_path, capfd):
    out = tmp_path / "x.png"
    argv = [f"--workdir={trained}", f"--prompt={TWO}", "--num=2", "--batch=4", "--steps=3", f"--out={out}"]
    _run(*argv, "--method=heun")
    assert "2 images of scfm (slow, step 4) in 3 steps by heun" in capfd.readouterr().err
    assert [r["method"] for r in read_records(out)] == ["heun", "heun"]
    pipeline = Pipeline(trained, batch_size=4)
    heun, euler = (pipeline(TWO, 3, 2, method=method) for method in ("heun", "euler"))
    assert not np.array_equal(heun, euler)
    np.testing.assert_array_equal(pipeline(TWO, 1, 2, method="heun"), pipeline(TWO, 1, 2))


LINES = [
    SEVEN,
    ":steps 2",
    TWO,
    ":seed 9",
    ":num 2",
    ":shift 2",
    "a handwritten digit one",
    ":guidance 2",
    SEVEN,
    ":guidance 3.5",
    ":steps 5",
    "a b c d e f g h i",
    "",
    ":help",
    ":size 512x512",
    ":size big",
    ":steps -1",
    ":steps 1001",
    ":colour red",
    "\udce9",
    TWO,
    ":quit",
    "never read",
]


@pytest.mark.usefixtures("own_programs")
def test_the_prompt_line_samples_tells_errors_and_compiles_once_for_all_settings(trained, tmp_path, capfd):
    model = Pipeline(trained, batch_size=4)
    (tmp_path / "00006.png").write_bytes(b"")
    lines = iter(LINES)
    interact(model, SampleRequest((), num=1, steps=1), Output(f"{tmp_path}/", count_on=True), ask=lambda _: next(lines))
    assert list(lines) == ["never read"]
    err = capfd.readouterr().err
    for text in (
        "error: the prompt '\\udce9' is not UTF-8",
        "never seen in training, so of no meaning: 'b', 'c', 'd'",
        "error: this run makes images of 8 x 8 pixels only",
        "error: :size big: cannot be read",
        "error: --steps is -1",
        "error: --steps is 1001, but must be at most 1000",
        "error: there is no setting :colour",
        ":guidance 3.5     guidance scale",
        "has 9 words, the model reads 8",
    ):
        assert text in err
    numbers = range(7, 7 + 1 + 1 + 2 + 2 + 2 + 2)
    assert sorted(p.stem for p in tmp_path.glob("000*.png")) == [f"{i:05d}" for i in (6, *numbers)]
    assert read_records(tmp_path / "00009.png")[0]["seed"] == 9
    # Without guidance and with it: no prompt, step count, seed, scale, shift or number compiles anything again.
    assert model.generate._sample._cache_size() == 2


def test_interactive_ends_at_the_end_of_input(trained, tmp_path, monkeypatch):
    def end(_):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    monkeypatch.setattr("shortcut_jax.sample.interact", lambda *args: interact(*args, ask=end))
    _run(f"--workdir={trained}", "--interactive", f"--out={tmp_path}/new/")
    assert (tmp_path / "new").is_dir()


def test_times_of_a_trajectory_are_those_of_the_shifted_grid(trained):
    model = Pipeline(trained)
    np.testing.assert_allclose(grid_times(model, SampleRequest((TWO,), 1, 2, shift=3.0)), [1.0, 0.75])


def test_more_than_one_step_begins_where_the_run_was_trained_from():
    one, early = tiny_assembly(), tiny_assembly(multistep_start=0.95)
    params = noisy_state(one).ema.slow
    made = lambda a: Generator(a.settings, a.model, a.mesh, 4, 4)
    drawn = lambda assembly, steps: made(assembly)(params, [SEVEN] * 4, steps)
    assert np.array_equal(drawn(one, 1), drawn(early, 1)) and not np.array_equal(drawn(one, 2), drawn(early, 2))
    assert made(early).spacing.start == 0.95 and made(one).spacing == Spacing()


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    path = tmp_path_factory.mktemp("edit") / "grey.png"
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(pixels).save(path)
    return path, pixels


@pytest.mark.usefixtures("own_programs")
def test_an_edit_between_equal_prompts_is_the_image_and_otherwise_changes_it(trained, grey, tmp_path):
    path, pixels = grey
    out = tmp_path / "edited.png"
    argv = [
        f"--workdir={trained}",
        f"--edit={path}",
        f"--source_prompt={SEVEN}",
        "--steps=4",
        "--skip=1",
    ]
    _run(*argv, f"--prompt={SEVEN}", f"--out={out}")
    np.testing.assert_array_equal(_pixels(out), pixels)
    _run(*argv, f"--prompt={TWO}", f"--out={out}")
    assert not np.array_equal(_pixels(out), pixels)
    (made,) = read_records(out)
    told = dict(prompt=TWO, source_prompt=SEVEN, steps=4, skip=1, plain=0, average=1, seed=0, index=0)
    assert {k: made[k] for k in told} == told
    pipeline = Pipeline(trained, batch_size=1)
    again = pipeline.edit(pixels[None, ..., None], SEVEN, TWO, 4, 1)
    np.testing.assert_array_equal(again[0, ..., 0], _pixels(out))
    pipeline.edit(pixels[None, ..., None], TWO, SEVEN, 3, 0, plain=1, average=2, draws=[(7, 3)], shift=2.0)
    assert pipeline.generate._edit._cache_size() == 1
    _run(*argv, f"--prompt={TWO}", "--seeds=4,0", "--batch=1", f"--out={tmp_path}/two/", "--average=2")
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["00000.png", "00001.png", "sheet.png"]


def test_an_image_of_another_size_is_fitted_and_it_is_told(trained, tmp_path, capfd):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "big.jpg")
    out = tmp_path / "x.png"
    argv = [f"--workdir={trained}", f"--edit={tmp_path}/big.jpg", f"--source_prompt={SEVEN}", "--steps=1"]
    _run(*argv, f"--prompt={SEVEN}", f"--out={out}")
    assert "the image of 20 x 30 is resized and cut to 8 x 8" in capfd.readouterr().err
    assert _pixels(out).shape == (8, 8)


def test_bad_input_is_one_clear_line(trained, grey, tmp_path, capfd):
    run = (f"--workdir={trained}", f"--out={tmp_path}/x.png")
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes("Bär".encode("latin-1"))
    (tmp_path / "torn.png").write_bytes(grey[0].read_bytes()[:60])
    fails = lambda *argv: _fails(capfd, *run, *argv)
    assert f"--prompts={Path.cwd()}/no.txt cannot be read: No such file" in fails("--prompts=no.txt")
    assert "has no prompt: write one a line" in fails(f"--prompts={tmp_path}/empty.txt")
    assert "is not UTF-8: byte 1 is 0xe4" in fails(f"--prompts={tmp_path}/latin.txt")
    assert "--seeds=1,x, but must be whole numbers" in fails("--prompt=x", "--seeds=1,x")
    assert "--num is 3, but there are 2 --seeds" in fails("--prompt=x", "--seeds=1,2", "--num=3")
    assert "the seed 4294967296 is out of range" in fails("--prompt=x", "--seeds=4294967296")
    assert "the seed -1 is out of range" in fails("--prompt=x", "--seed=-1")
    assert "--num is out of range: it must be less than 2^31" in fails("--prompt=x", f"--num={10**40}")
    assert "is not UTF-8" in fails("--prompt=caf\udce9")
    assert "--shift is 0, but must be positive" in fails("--prompt=x", "--shift=0")
    assert "--batch is 0" in fails("--prompt=x", "--batch=0")
    assert "method" in fails("--prompt=x", "--method=rk4")
    assert "--interactive needs a folder" in fails("--interactive")
    assert "give --interactive or prompts, not both" in fails("--interactive", "--prompt=x")
    assert "--source_prompt is missing" in fails("--prompt=x", "--edit=a.png")
    edit = ("--prompt=x", "--source_prompt=y")
    assert f"--edit={Path.cwd()}/a.png cannot be read: No such file" in fails(*edit, "--edit=a.png")
    assert "torn.png cannot be read as an image: " in fails(*edit, f"--edit={tmp_path}/torn.png")
    assert "latin.txt cannot be read as an image: unsupported format" in fails(*edit, f"--edit={tmp_path}/latin.txt")
    assert "an edit of 4 steps, 4 of them skipped" in fails(*edit, f"--edit={grey[0]}", "--skip=4")
    assert "--edit takes one --prompt" in fails(*edit, f"--edit={grey[0]}", "--prompt=z")
    assert "--edit goes neither with --method=heun" in fails(*edit, f"--edit={grey[0]}", "--method=heun")
    with pytest.raises(UsageError, match="does not say how it was made"):
        read_records(grey[0])
    with pytest.raises(UsageError, match="cannot be read as an image"):
        read_records(tmp_path / "latin.txt")


def test_words_that_the_model_never_saw_are_told_with_those_it_knows(trained, capfd):
    pipeline = Pipeline(trained)
    known = known_words(pipeline.settings.data)
    assert unknown_words([SEVEN, "a cat and a Seven", "a cat"], known) == ["cat", "and", "Seven"]
    assert unknown_words([SEVEN, ""], known) == [] and pipeline.notes(SampleRequest((SEVEN,))) == []
    for _ in range(2):
        pipeline("a cat", steps=1)
    err = capfd.readouterr().err
    assert err.count("never seen in training, so of no meaning: 'cat'; the words it knows are a, handwritten") == 1
    (line,) = pipeline.notes(SampleRequest(("a cat",), 1, 1))
    assert line in err
    for prompt in (None, "\udce9"):
        with pytest.raises(ValueError, match=r"a prompt is None|is not UTF-8"):
            pipeline([prompt], steps=1)


def test_guidance_zero_is_none_for_a_model_without_embedding(trained, grey):
    pipeline, pixels = Pipeline(trained), grey[1][None, ..., None]
    np.testing.assert_array_equal(pipeline(TWO, 2, guidance=0.0), pipeline(TWO, 2))
    edited = pipeline.edit(pixels, SEVEN, TWO, 2, guidance=0.0, source_guidance=0.0)
    np.testing.assert_array_equal(edited, pipeline.edit(pixels, SEVEN, TWO, 2))
    model = Pipeline(trained)
    assert model.notes(SampleRequest((TWO,), 1, 1, guidance=0.0)) == ["guidance 0: none, as 1 is"]


def test_one_prompt_into_a_file_is_one_image_that_can_be_edited(trained, folder, tmp_path, capfd):
    argv = [f"--workdir={trained}", "--steps=1", f"--out={tmp_path}/seven.png"]
    _run(*argv, f"--prompt={SEVEN}")
    assert _pixels(tmp_path / "seven.png").shape == (8, 8) and len(read_records(tmp_path / "seven.png")) == 1
    edit = [*argv, f"--prompt={TWO}", f"--source_prompt={SEVEN}"]
    capfd.readouterr()
    _run(*edit, f"--edit={tmp_path}/seven.png")
    assert "resized" not in capfd.readouterr().err
    line = _fails(capfd, *edit, f"--edit={folder}/sheet.png")
    assert "sheet.png is a sheet of several images, but one is edited: sample it alone (--num=1)" in line
    assert "is a trajectory" in _fails(capfd, *edit, f"--edit={folder}/00000_trajectory.png")


def test_sixteen_images_remain_the_default_where_several_fit(tmp_path):
    num = lambda *argv: sample._request(sample._parse(["sample", *argv])).num
    run, out = ("--workdir=w", "--prompt=x"), f"--out={tmp_path}/x.png"
    assert num(*run) == num(*run, out) == 1
    assert num(*run, f"--out={tmp_path}/") == num(*run, "--prompt=y", out) == sample.SEVERAL
    assert num(*run, out, "--seeds=1,2,3") == 3 and num(*run, out, "--num=4") == 4
    assert num("--checkpoint=c", "--prompt=x", "--prompt=y", f"--out={tmp_path}/") == 1


def test_metadata_of_older_and_other_files_tells_a_sheet_as_far_as_it_can(tmp_path):
    def layout(size, **chunks):
        info = PngInfo()
        for name, text in chunks.items():
            info.add_text(name, text)
        Image.new("L", size).save(tmp_path / "x.png", pnginfo=info)
        with Image.open(tmp_path / "x.png") as image:
            return layout_of(image)

    one = {"width": 8, "height": 8}
    old = lambda *records: {"shortcut_jax": json.dumps({"pictures": records})}
    assert layout((8, 8)) == layout((8, 8), **old(one)) == layout((8, 8), shortcut_jax="{") == "image"
    assert layout((8, 8), shortcut_jax="[" * 10**5) == "image"
    assert layout((90, 90), **old(one)) == layout((90, 90), **old(one, one)) == "sheet"
    assert layout((90, 90), parameters="x\nSteps: 4, Images: 16, Version: shortcut_jax 0.1") == "sheet"


def test_a_view_that_the_checkpoint_lacks_is_named_with_those_it_has(trained, tmp_path):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    for step in (tmp_path / "checkpoints").iterdir():
        shutil.rmtree(step / "slow")
    with pytest.raises(CheckpointError, match="lack the view 'slow': choose online or fast"):
        Pipeline(tmp_path)
    assert Pipeline(tmp_path, view="fast").step == 4
