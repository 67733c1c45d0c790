"""What an earlier version has written is read: a run, a converted pipeline and a prepared set of 2026-11-27."""

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from shortcut_jax import convert, sample, train
from shortcut_jax.data.format import PreparedSet

STORED = Path(__file__).parent / "stored" / "2026-11-27.tar.gz"
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder with `run`, `converted` (of that run) and `set`."""
    folder = tmp_path_factory.mktemp("stored")
    with tarfile.open(STORED) as tar:
        tar.extractall(folder, filter="data")
    return folder


def test_a_run_is_sampled_and_gives_the_images_that_it_gave(stored, tmp_path):
    argv = ["--prompt=a handwritten digit three", "--steps=4", "--num=2", "--seed=5", f"--out={tmp_path}/three.png"]
    assert sample.main(["sample", f"--workdir={stored}/run", *argv]) == 0
    with Image.open(tmp_path / "three.png") as now, Image.open(STORED.with_suffix("").with_suffix(".png")) as then:
        assert np.abs(np.asarray(now, int) - np.asarray(then, int)).max() <= 2  # other processors round otherwise


@pytest.mark.slow
def test_a_run_is_resumed_by_its_own_config(stored, data_dir, tmp_path, capfd):
    workdir = shutil.copytree(stored / "run", tmp_path / "run")
    longer = ["--config.steps=6", "--stop_at=5", f"--config.data.dir={data_dir}"]
    assert train.main(["train", f"--config={workdir}/config.json", f"--workdir={workdir}", *longer]) == 0
    error = capfd.readouterr().err
    assert "changed since the last run: " in error and "resuming at step 4" in error
    assert (workdir / "checkpoints/5").is_dir()


def test_a_converted_pipeline_has_the_weights_of_its_run(stored, tmp_path):
    for name in ("run", "converted"):
        argv = ["convert", f"--from={stored}/{name}", "--format=bfl", f"--to={tmp_path}/{name}.safetensors"]
        assert convert.main(argv) == 0
    run, converted = (load_file(tmp_path / f"{name}.safetensors") for name in ("run", "converted"))
    assert run.keys() == converted.keys() and len(run) > 30
    assert all(np.array_equal(value, converted[name]) for name, value in run.items())


def test_a_prepared_set_is_read(stored):
    records = PreparedSet(stored / "set").records("train")
    captions = sorted(records[i]["caption"].decode() for i in range(len(records)))
    assert captions == ["number 0", "number 1", "number 2", "number 3"]
    assert records[0]["image"].shape == (16, 16, 3)
