"""Emoji at 32 x 32 pixels, small enough for CPUs: the geometry of the digits on blocks of 2 x 2 pixels, 64 tokens.

Command:  python -m shortcut_jax.prepare --source=emoji64 --out=~/tensorflow_datasets/emoji32 --store=pixels \\
              --resolution=32 --where=variant=base --caption=subgroup --validation=0
          python -m shortcut_jax.train --config=configs/emoji32.py
Hardware: two CPU cores; the source is a folder of 64 x 64 images with a metadata.jsonl.
Time:     about 9 minutes for 1,000 steps of plain flow matching.
Expected: after 1,000 steps colours and outlines follow the caption, faces do not come (docs/objectives.md).

The caption is the subgroup ("face-smiling"): 98 captions of 1,905 images. A caption for each image would leave no
distribution to learn, and few steps would be trivial.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The run's config."""
    c = runpy.run_path(str(Path(__file__).with_name("digits.py")))["get_config"]()
    c.steps = 2000
    c.model.preset = "emoji"
    c.model.double_blocks, c.model.single_blocks = 1, 2
    c.model.width, c.model.heads, c.model.axes = 128, 4, (8, 12, 12)
    c.data.name = "emoji32"
    c.data.height = c.data.width = 32
    c.data.stride = 2
    return c
