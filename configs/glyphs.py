"""Letters and digits in the fonts of this machine, 16 x 16 pixels: network and settings are those of configs/digits.py.

Command:  python -m shortcut_jax.train --config=configs/glyphs.py
Hardware: two CPU cores, 2 GB. The set is drawn on first use, in half a minute for 841 fonts (52,397 images).
Time:     not measured yet; a step has four times the image tokens of one of the digits.
Expected: not measured yet.

Captions name the character alone ("the capital letter k"), so that a caption asks for a distribution: its many fonts.
docs/objectives.md names the font packages.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The run's config."""
    c = runpy.run_path(str(Path(__file__).with_name("digits.py")))["get_config"]()
    c.steps = 2000
    c.data.name = "glyphs"
    c.data.height = c.data.width = 16
    return c
