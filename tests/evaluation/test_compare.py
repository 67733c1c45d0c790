import re
import shutil

import pytest
from PIL import Image

from shortcut_jax import cli, compare
from shortcut_jax.evaluation.digits import Score

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.slow
def test_runs_are_judged_alike_and_the_first_is_the_baseline(trained, tmp_path, data_dir, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    argv = ["compare", f"--workdir={trained}", f"--workdir={copy}", "--steps=1,2", "--seeds=0,3", "--images=20"]
    assert compare.main([*argv, f"--data_dir={data_dir}", f"--out={tmp_path / 'out'}"]) == 0
    head, _, first, second, ratio = capsys.readouterr().out.strip().splitlines()
    assert re.fullmatch(r"\| objective +\| 1 step +\| 2 steps +\|", head)
    # The same weights on the same captions and noise: the same numbers, so a ratio of 1.
    assert first.split("|")[2:] == second.split("|")[2:] and "±" in first
    assert first.split("|")[1].strip() == "run" and second.split("|")[1].strip() == "copy"
    assert re.fullmatch(r"\| copy / run +\| 1.00 x +\| 1.00 x +\|", ratio)
    written = (tmp_path / "out.md").read_text()
    for fact in (ratio, "20 images for each of 2 noise seeds", "4 steps, global batch 32, training seed 0"):
        assert fact in written
    assert Image.open(tmp_path / "out.png").height > 4 * 48


def test_ratios_are_of_mean_distances():
    scores = {
        "flow": [Score("slow", 1, 9, (2.0, 4.0), (1.0, 1.0))],
        "scfm": [Score("slow", 1, 9, (1.0, 0.5), (0.5, 0.7))],
    }
    lines = compare.table(scores, [1]).splitlines()
    assert lines[2:] == [
        "| flow        | 3.00 ±1.00 / 1.000 |",
        "| scfm        | 0.75 ±0.25 / 0.600 |",
        "| scfm / flow | 0.25 x             |",
    ]


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        (["--steps=0,1"], "--steps=0,1, but must be whole numbers of at least 1"),
        (["--images=1"], "--images is 1, but must be 0 for all, or at least 2"),
        (["--seeds=a"], "--seeds=a, but must be whole numbers from 0 to 4294967295"),
        ([], "no checkpoint in"),
    ],
)
def test_bad_input_is_one_clear_line(extra, pattern, tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        cli.run(compare.main, ["compare", f"--workdir={tmp_path}", *extra])
    assert stop.value.code == 1
    assert pattern in capfd.readouterr().err
