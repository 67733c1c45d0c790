"""Post-training from ten images: configs/digits_distill.py without flow rows, which would learn the images by heart.

Command:  python -m shortcut_jax.train --config=configs/digits_fewshot.py
          (another number: --config.data.limit=100)
Hardware: two CPU cores, 2 GB.
Time:     about 3 minutes for 600 steps, and about 12 before them for the teacher, where runs/digits-teacher is absent.
Expected: slow EMA at 1 / 2 / 3 / 4 / 8 / 32 steps, after a teacher of 1,000 steps and on all 1,797 captions: a Frechet
          distance of 0.72 / 0.51 / 0.42 / 0.43 / 0.52 / 0.70 (means of three training seeds; docs/objectives.md).

All rows learn from the model's own EMAs and from the teacher; the images only set where on its paths they learn.
A range of shifts makes the times of training continuous: with those of the student step counts only (shift 1), 3 steps
reach 0.97, next to 0.50 at 2 and 0.48 at 4.
"""

import runpy
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict


def _distill() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).with_name("digits_distill.py")))


def get_config() -> ConfigDict:
    """The run's config."""
    c = _distill()["get_config"]()
    c.data.limit = 10
    c.rows.self_rows, c.rows.flow_rows = 1, 0
    c.timestep_range = (0.0, 1.0)
    c.shift.low, c.shift.high = 0.7, 1.4
    return c


def get_teacher_config() -> ConfigDict:
    """The run that is made first where `init_from` is not found; it learns from all images."""
    return _distill()["get_teacher_config"]()
