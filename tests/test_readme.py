"""What the README and the pages of docs/ show has to work."""

import importlib
import re
import shutil
from pathlib import Path

import jax
import pytest
from PIL import Image

from shortcut_jax import cli
from shortcut_jax.config.checks import from_config
from shortcut_jax.data.training import TrainingData
from shortcut_jax.run.assembly import Assembly
from shortcut_jax.run.check_data import check_data
from tests.conftest import LORA, SMALL_RUN
from tests.readme_commands import PAGES, ROOT, shown


def test_the_config_it_shows_can_be_trained(data_dir):
    (text,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", PAGES["docs/training.md"], re.DOTALL)
        if "def get_config" in block
    )
    names = {}
    exec(text, names)
    config = names["get_config"]()
    config.data.dir = data_dir
    assembly = Assembly(from_config(config), jax.devices()[:1])
    check_data(assembly.settings, assembly.model, TrainingData(assembly.settings.data))
    loss = jax.eval_shape(assembly.train_step, assembly.state_shapes, assembly.batch_shapes())[1]["loss"]
    assert loss.shape == ()


def test_groups_of_fields_are_where_it_says():
    package = ROOT / "shortcut_jax"
    for group, name in re.findall(r"`(\w+)` \(`(\w+/\w+\.py)`", PAGES["docs/training.md"]):
        assert f"\n    {group}: " in (package / "config/schema.py").read_text()
        assert "@dataclass" in (package / name).read_text()


def test_the_readme_is_short_and_no_link_of_a_page_is_broken():
    assert len(PAGES["README.md"].splitlines()) <= 180
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert pages - PAGES.keys() == {"docs/digits.md", "docs/index.md"}
    for name, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#]+?)(?:#[\w-]+)?\)", text):
            if not link.startswith("http"):
                assert (ROOT / name).parent.joinpath(link).exists(), f"{name} links to {link}"


class ParsedError(Exception):
    """The options of a command that has been parsed and shall not run."""


@pytest.mark.parametrize(("module", "arguments"), shown(), ids=lambda part: part if isinstance(part, str) else "")
def test_every_command_is_understood(module, arguments, monkeypatch):
    parse = cli.parse

    def parse_only(*args, **options):
        raise ParsedError(parse(*args, **options))

    monkeypatch.setattr(cli, "parse", parse_only)
    with pytest.raises(ParsedError) as parsed:
        importlib.import_module(f"shortcut_jax.{module}").main([module, *arguments])
    (options,) = parsed.value.args
    if getattr(options, "config", None) is not None:
        from_config(options.config)


def _small(module, arguments, data_dir):
    """Flags that make a command of the digits small; None for one that is not run here."""
    text = " ".join(arguments)
    if module == "train" and re.search("^--config=configs/digits", text) and not re.search("4000|runs/[^m]", text):
        values = {**SMALL_RUN, "model.double_blocks": 2, "data.dir": data_dir}
        if "digits_distill" in text:
            values |= {key.replace("__", "."): value for key, value in LORA.items()}
        return {f"--config.{key}": value for key, value in values.items()}
    if module == "evaluate" and "runs/digits" in text:
        small = {"--images": 20, "--steps": 1, "--other_steps": 1, "--other_images": 20}
        return small | {"--extras": "grid,latency", "--data_dir": data_dir}
    if module in ("sample", "convert") and re.search("runs/(digits|mine)", text) and "--interactive" not in text:
        return {}
    return None


@pytest.mark.slow
def test_the_road_of_the_digits_works_from_a_relative_folder(trained, data_dir, tmp_path, monkeypatch, one_device):
    """Every command about the digits in its order, with a small network and few steps; the first run is given."""
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    for name in ("digits-scfm", "digits-teacher"):
        shutil.copytree(trained, Path("runs") / name)
    Path("prompts.txt").write_text("a handwritten digit three\na handwritten digit nine\n")
    for module, arguments in shown():
        small = _small(module, arguments, data_dir)
        if small is not None:
            kept = [argument for argument in arguments if argument.split("=")[0] not in small]
            flags = [f"{name}={value}" for name, value in small.items()]
            assert importlib.import_module(f"shortcut_jax.{module}").main([module, *kept, *flags]) == 0
    with Image.open("seven.png") as seven, Image.open("one.png") as one:
        assert seven.size == one.size == (8, 8)
    written = {"lora.safetensors", "comfy.safetensors", "merged", "mine", "runs/digits-scfm/evaluation/evaluation.html"}
    assert all(Path(name).exists() for name in written)
