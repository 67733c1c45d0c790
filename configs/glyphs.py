"""Letters and digits in the fonts of this machine, 16 x 16 pixels: network and settings are those of configs/digits.py.

Command:  python -m shortcut_jax.train --config=configs/glyphs.py
Hardware: two CPU cores, 2 GB. The set is drawn on first use, in half a minute for 841 fonts (52,397 images).
Time:     about 20 minutes for 2,000 steps (9 to 10 for 1,000, of flow 8).
Expected: not measured yet; after 1,000 steps a Frechet distance in the features of the set's own network of
          377 / 188 / 161 / 147 / 120 / 92 at 1 / 2 / 3 / 4 / 8 / 32 steps, where flow has 83 at 32 (one training seed;
          docs/objectives.md).

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
