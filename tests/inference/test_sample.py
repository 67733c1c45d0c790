import jax
import numpy as np
import pytest
from PIL import Image

from shortcut_jax import Pipeline, cli, sample
from shortcut_jax.core.tree import count_parameters
from shortcut_jax.errors import CheckpointError
from shortcut_jax.run.workdir import record_of
from shortcut_jax.runtime.checkpoint import Checkpoints
from shortcut_jax.steps.state import to_items
from tests.helpers import BOTH_BLOCKS, noisy_state, tiny_assembly

pytestmark = pytest.mark.usefixtures("one_device")


def _fails(capfd, argv):
    with pytest.raises(SystemExit) as stop:
        cli.run(sample.main, ["sample", *argv])
    assert stop.value.code == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def test_a_contact_sheet_has_a_row_a_prompt(trained, tmp_path, capfd):
    out = tmp_path / "sevens.png"
    argv = ["sample", f"--workdir={trained}", "--prompt=a handwritten digit seven", "--prompt=two", f"--out={out}"]
    assert sample.main([*argv, "--num=3", "--steps=2"]) == 0
    assert "6 images of scfm (slow, step 4) in 2 steps" in capfd.readouterr().err
    with Image.open(out) as image:
        assert image.width > 3 * 48 and image.height > 2 * 48


def test_images_follow_seed_view_steps_and_guidance_and_repeat(trained):
    slow, online = Pipeline(trained), Pipeline(trained, view="online")
    first = slow("a handwritten digit two", steps=2, num=2)
    assert first.shape == (2, 8, 8, 1) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, slow("a handwritten digit two", steps=2, num=2))
    for other in (
        slow("a handwritten digit two", steps=2, num=2, seed=1),
        online("a handwritten digit two", steps=2, num=2),
        slow("a handwritten digit two", steps=1, num=2),
        slow("a handwritten digit two", steps=2, num=2, guidance=9.0),
    ):
        assert not np.array_equal(first, other)


@pytest.mark.slow
def test_only_one_view_is_read_from_disk(tmp_path, one_device):
    """A model large enough that modules and JSON files are small beside a view; the other items may even be gone."""
    assembly = tiny_assembly(**BOTH_BLOCKS, model__preset="digits", model__width=256, model__heads=8)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state = noisy_state(assembly)
    counters = {"step": 1, "skipped": 0, "skipped_total": 0}
    checkpoints.save(1, to_items(state), {"step": 1, "seed": 0, "config": record_of(assembly), "counters": counters})
    checkpoints.close()
    for name in ("params", "fast", "optimizer"):
        for path in (tmp_path / "checkpoints" / "1" / name).rglob("*"):
            if path.is_file() and path.stat().st_size > 4096:
                path.write_bytes(b"")
    before = _bytes_read()
    pipeline = Pipeline(tmp_path)
    read = _bytes_read() - before
    size = 4 * count_parameters(pipeline.params)
    stored = sum(p.stat().st_size for p in (tmp_path / "checkpoints" / "1" / "slow").rglob("*") if p.is_file())
    # Compressed on disk, so a little less than its size; all of it went through what is counted here.
    assert size > 10_000_000 and 0.9 * size < 0.99 * stored <= read <= 1.1 * size, (read, stored, size)


def _bytes_read():
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


def test_long_prompts_and_guidance_are_told(trained, tmp_path, capfd):
    prompt = "a handwritten digit seven and some more words that do not fit"
    out = tmp_path / "x.png"
    argv = ["sample", f"--workdir={trained}", f"--prompt={prompt}", "--num=1", "--guidance=2", f"--out={out}"]
    assert sample.main(argv) == 0
    err = capfd.readouterr().err
    assert (
        "the prompt has 12 words, the model reads 8: it is cut to 'a handwritten digit seven and some more words'"
        in err
    )
    assert "guidance 2: classifier-free, two evaluations a step" in err


def test_the_pipeline_says_what_is_cut_and_refuses_steps_out_of_range(trained, capfd):
    pipeline = Pipeline(trained, max_steps=3)
    pipeline(["one", "a b c d e f g h i"], steps=1)
    err = capfd.readouterr().err
    assert err.count("it is cut to") == 1 and "has 9 words, the model reads 8: it is cut to 'a b c d e f g h'" in err
    for steps in (0, -1, 4):
        with pytest.raises(ValueError, match=f"asked for {steps} sampling steps, but must be 1 to 3"):
            pipeline("one", steps=steps)
    with pytest.raises(ValueError, match="asked for 0 images of 1 prompts"):
        pipeline("one", num=0)
    with pytest.raises(ValueError, match="asked for 1 images of 0 prompts"):
        pipeline([])


def test_bad_input_is_one_clear_line(trained, tmp_path, capfd):
    good = [f"--workdir={trained}", "--prompt=x"]
    assert "--steps is 0" in _fails(capfd, [*good, "--steps=0"])
    assert "--prompt is missing" in _fails(capfd, [f"--workdir={trained}"])
    assert "end it in .png" in _fails(capfd, [*good, "--out=x.gif"])
    assert "is not found" in _fails(capfd, [*good, f"--out={tmp_path}/no/x.png"])
    assert "no checkpoint in" in _fails(capfd, [f"--workdir={tmp_path}", "--prompt=x"])
    assert "view" in _fails(capfd, [*good, "--view=middle"])
    with pytest.raises(ValueError, match="one of online, fast, slow"):
        Pipeline(trained, view="middle")
    with pytest.raises(CheckpointError):
        Pipeline(tmp_path)


def test_a_model_trained_on_one_device_samples_on_eight(trained, monkeypatch):
    expected = Pipeline(trained)("a handwritten digit two", steps=2, num=5)
    monkeypatch.undo()
    assert len(jax.devices()) == 8
    actual = Pipeline(trained)("a handwritten digit two", steps=2, num=5)
    assert np.abs(actual.astype(int) - expected).max() <= 1
