"""What the README shows has to work."""

import re
from pathlib import Path

import jax

from shortcut_jax.assemble import Assembly
from shortcut_jax.check_data import check_data
from shortcut_jax.data.training import TrainingData
from shortcut_jax.resolve import from_config

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_config_it_shows_can_be_trained(data_dir):
    (text,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "def get_config" in block)
    names = {}
    exec(text, names)
    config = names["get_config"]()
    config.data.dir = data_dir
    assembly = Assembly(from_config(config), jax.devices()[:1])
    check_data(assembly.settings, assembly.model, TrainingData(assembly.settings.data))
    loss = jax.eval_shape(assembly.train_step, assembly.state_shapes, assembly.batch_shapes)[1]["loss"]
    assert loss.shape == ()


def test_groups_of_fields_are_where_it_says():
    package = Path(__file__).parent.parent / "shortcut_jax"
    for group, name in re.findall(r"`(\w+)` \(`(\w+/\w+\.py)`\)", README):
        assert f"\n    {group}: " in (package / "settings.py").read_text()
        assert "@dataclass" in (package / name).read_text()
