"""FLUX.1 dev distilled to few steps from ten text-image pairs: `flux_distill` on a set of ten.

Command:  python -m shortcut_jax.train --config=configs/flux_fewshot.py
Hardware: one 80 GB GPU for 8 rows of 512 px, or any mesh.
Time:     not measured.
Expected: not measured. On the embedded digits ten images match all of them at 1 and 2 steps, not beyond
          (Frechet distance, docs/post-training.md).
Data:     the first ten records of a set prepared as for `flux_distill`: the teacher's field is what is learned, and the
          images only say where.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The run's config."""
    c = runpy.run_path(str(Path(__file__).with_name("flux_distill.py")))["get_config"]()
    c.data.limit = 10
    c.steps = 3000
    return c
