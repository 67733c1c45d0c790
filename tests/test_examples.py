"""The notebooks of examples/, with small networks and few steps."""

from pathlib import Path

import matplotlib
import pytest

from shortcut_jax.steps.objectives import OBJECTIVES
from tests.conftest import LORA, SMALL_RUN

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.usefixtures("one_device")


def _run(name, changes, tmp_path, monkeypatch):
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    text = (EXAMPLES / name).read_text()
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    exec(compile(text, name, "exec"), {"__name__": name})


def _flags(values):
    return repr([f"--config.{key}={value}" for key, value in values.items()])


def test_the_digits_from_training_to_images(data_dir, tmp_path, monkeypatch):
    flags = _flags(SMALL_RUN | {"data.dir": data_dir})
    _run("digits.py", {'["--config.steps=1000"]': flags, "(1, 2, 4, 32)": "(1, 2)"}, tmp_path, monkeypatch)


@pytest.mark.slow
def test_a_teacher_is_distilled_and_exported(trained, data_dir, tmp_path, monkeypatch):
    lora = {key.replace("__", "."): value for key, value in LORA.items()}
    small = SMALL_RUN | lora | {"model.double_blocks": 2, "data.dir": data_dir}
    changes = {"FLAGS: list[str] = []": f"FLAGS = {_flags(small)}", '"runs/example-teacher"': f"r'{trained}'"}
    _run("distill.py", changes, tmp_path, monkeypatch)
    assert (tmp_path / "lora.safetensors").stat().st_size > 1000


def test_an_objective_is_one_function_and_one_record(data_dir, tmp_path, monkeypatch):
    changes = {
        "model.preset": "tiny",
        "model.double_blocks": 0,
        "data.dir": data_dir,
        "steps": 2,
        "batch_size": 16,
        "eval.views": (),
        "eval.images": (),
        "eval.steps": (1,),
        "mesh.min_shard": 0,
    }
    try:
        _run("objective.py", {"CHANGES: dict[str, object] = {}": f"CHANGES = {changes!r}"}, tmp_path, monkeypatch)
    finally:
        OBJECTIVES.pop("slow_alone", None)
    assert (tmp_path / "runs/example-objective/checkpoints/2").is_dir()
