"""What a run prints and leaves for people: lines, tables, sample grids."""

import shutil

import numpy as np
import pytest
from PIL import Image

from shortcut_jax import train
from shortcut_jax.errors import TrainingError
from shortcut_jax.training import loop, session
from tests.helpers import BOTH_BLOCKS, tiny_assembly

pytestmark = pytest.mark.usefixtures("one_device")


def test_the_printed_table_is_the_reports(trained, tmp_path, arguments, capfd):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    (workdir / "report.md").unlink()
    assert train.main(arguments(workdir, **BOTH_BLOCKS)) == 0
    printed = [line for line in capfd.readouterr().out.splitlines() if line.startswith("|")]
    report = [line for line in (workdir / "report.md").read_text().splitlines() if line.startswith("|")]
    assert len(printed) == 5 and printed == report
    again = [line for line in (trained / "report.md").read_text().splitlines() if line.startswith("|")]
    assert again == report  # the same weights, noise and captions


@pytest.mark.slow
def test_grids_during_a_run_have_the_same_noise_and_captions(tmp_path, arguments):
    # Weights that hardly move give one image, whenever it is drawn.
    quiet = {"sample_every": 1, "optimizer__learning_rate": 1e-12, "eval__views": "()", "eval__images": "()"}
    assert train.main(arguments(tmp_path / "run", steps=3, **quiet)) == 0
    paths = sorted((tmp_path / "run" / "samples").iterdir())
    assert [p.name for p in paths] == [f"step_{n:08d}.png" for n in (1, 2, 3)]
    first, *others = (np.asarray(Image.open(p)).astype(int) for p in paths)
    assert first.std() > 10
    for other in others:
        assert np.abs(other - first).max() <= 1


@pytest.mark.parametrize(
    ("changes", "start", "said"),
    [
        ({"student_steps": (1, 2, 3, 4)}, 0, "counts 3, 4 use smaller steps that no sample trains: 2 x them"),
        ({"student_steps": (1, 2, 3, 4)}, 7, None),
        ({"student_steps": (1, 2, 3, 4), "objective": "flow"}, 0, None),
    ],
)
def test_counts_without_a_finer_one_are_named_once(changes, start, said, tmp_path, capfd):
    session.announce(tiny_assembly(**changes), tmp_path, start)
    err = capfd.readouterr().err
    assert (said in err) if said else ("no sample trains" not in err)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"one_step_share": 0.75}, "of the self rows that begin at pure noise, 75% learn one step\n"),
        ({"multistep_start": 0.98}, "one step begins at t = 1, two at 0.99, many at 0.98\n"),
        ({"student_steps": (1, 2, 3, 4)}, "48% learn one step; below 50% one step learns a mean over the others"),
        ({"student_steps": (1, 2, 3, 4)}, "others: set one_step_share in place of student_weights\n"),
        ({"one_step_share": 0.25}, "25% learn one step; below 50% one step learns a mean over the others: raise"),
        (
            {"timestep_range": (0.0, 0.9), "rows__self_rows": 0, "rows__flow_rows": 4},
            "timestep_range ends at 0.9: nothing trains the times above, where sampling begins",
        ),
    ],
)
def test_what_trains_the_times_where_sampling_begins_is_told(changes, said, tmp_path, capfd):
    session.announce(tiny_assembly(**changes), tmp_path, 0)
    assert said in capfd.readouterr().err


def test_flow_alone_trains_all_times_and_says_nothing_else(tmp_path, capfd):
    session.announce(tiny_assembly(objective="flow", timestep_range=(0.0, 0.9)), tmp_path, 0)
    err = capfd.readouterr().err
    assert "unused with objective=flow: student_steps, timestep_range" in err and "nothing trains" not in err


@pytest.mark.parametrize(("power", "said"), [(0.0, True), (1.0, False)])
def test_meanflow_without_the_weights_of_its_authors_is_told(power, said, tmp_path, capfd):
    session.announce(tiny_assembly(objective="meanflow", adaptive_power=power), tmp_path, 0)
    assert ("its authors weigh them, adaptive_power=1" in capfd.readouterr().err) == said


def test_weights_that_are_not_finite_are_not_saved(trained, tmp_path):
    from shortcut_jax.runtime.checkpoint import Checkpoints

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(TrainingError, match="step 3: the weights are not finite"):
        loop.save(3, tiny_assembly(), checkpoints, None, {"param_norm": np.float32(np.inf)})
    assert checkpoints.steps() == []
