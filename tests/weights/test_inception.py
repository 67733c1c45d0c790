import re

import numpy as np
import pytest

from shortcut_jax import cli, convert
from shortcut_jax.formats import export
from shortcut_jax.formats.inference_checkpoint import OrbaxParams, read_record
from shortcut_jax.weights.inception import RULES
from tests.helpers import to_flax, to_torch
from tests.weights.inception_cases import SMALL, random_release, shapes


@pytest.fixture(scope="module")
def released():
    return random_release(SMALL)


def _convert(folder, tensors, *flags):
    export.write_tensors(folder / "inception.safetensors", tensors, {})
    argv = ["convert", f"--from={folder}/inception.safetensors", f"--to={folder}/inception", *flags]
    with pytest.raises(SystemExit) as stop:
        cli.run(convert.main, argv)
    return stop.value.code


def test_there_and_back_is_the_identity(released):
    params = to_flax(released, RULES, shapes(SMALL))
    assert params["mixed_7c/branch3x3dbl_3a/kernel"].shape == (1, 3, 24, 24)
    back = to_torch(params, RULES)
    assert back.keys() == released.keys()
    assert all(np.array_equal(back[k].view(np.uint32), v.view(np.uint32)) for k, v in released.items())


def test_a_file_with_counters_converts(released, tmp_path, capfd):
    """One without is converted where features are tested."""
    norms = [name.removesuffix("running_var") for name in released if name.endswith("running_var")]
    counters = {f"{norm}num_batches_tracked": np.zeros((), np.int64) for norm in norms}
    assert _convert(tmp_path, {**released, **counters}) == 0
    assert "found: InceptionV3 of FID with 128 features in the layout of torchvision" in capfd.readouterr().err
    ((stored,), _) = read_record(tmp_path / "inception")
    assert stored.kind == "inception" and stored.config == SMALL
    read, expected = OrbaxParams(stored.folder), to_flax(released, RULES, shapes(SMALL))
    assert {k: read.spec(k).shape for k in read} == {k: v.shape for k, v in expected.items()}
    name = "mixed_6c/branch7x7_2/variance"  # all are read where features are tested
    assert np.array_equal(read[name], expected[name])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"Mixed_6b.branch_pool.bn.running_mean": None}, "missing from the checkpoint: Mixed_6b.branch_pool.bn.runn"),
        ({"Mixed_5b.branch1x1.conv.weight": None}, "missing from the checkpoint: Mixed_5b.branch1x1.conv.weight"),
        ({"fc.weight": None}, "missing from the checkpoint: fc.weight"),
        ({"Mixed_8a.conv.weight": np.ones(3, "f")}, "in the checkpoint, but not in this model: Mixed_8a.conv.weight"),
        ({"Conv2d_1a_3x3.conv.weight": np.ones((3, 3, 3, 2), "f")}, "does not fit conv2d_1a_3x3/kernel"),
        ({"AuxLogits.fc.bias": np.ones(3, "f")}, "torchvision's InceptionV3 (fc.weight has 63 classes)"),
        ({"fc.weight": np.ones((62, 128), "f")}, "torchvision's InceptionV3 (fc.weight has 62 classes)"),
    ],
    ids=["missing", "sign", "classifier", "leftover", "shape", "aux", "classes"],
)
def test_another_layout_is_one_line_that_names_it(released, changed, message, tmp_path, capfd):
    tensors = {k: v for k, v in {**released, **changed}.items() if v is not None}
    assert _convert(tmp_path, tensors) == 1
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "inception").exists()


def test_it_is_written_for_this_package_alone(released, tmp_path, capfd):
    assert _convert(tmp_path, released, "--format=diffusers") == 1
    assert re.search("error: inception judges images.*use --format=orbax", capfd.readouterr().err)
