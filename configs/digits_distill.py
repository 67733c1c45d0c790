"""Post-training on the embedded default: adapters that make a trained digits model need few steps.

Command:  python -m shortcut_jax.train --config=configs/digits_distill.py
Hardware: two CPU cores, 2 GB.
Time:     about 3 minutes for 600 steps, and about 12 before them for the teacher, where runs/digits-teacher is absent.
Expected: slow EMA at 1 / 2 / 3 / 4 / 32 steps: a Frechet distance of 2.22 / 0.39 / 0.20 / 0.19 / 0.45, where the
          teacher has 6.11 / 1.97 / 1.05 / 0.73 / 0.18 (4 noise seeds; the README has what keeps the 32 steps).

A range of shifts makes the times of training continuous: with the times of the student step counts only (shift 1),
3 steps reached 0.53, beside 0.30 at 2 and 0.20 at 4.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from shortcut_jax.config import default_config


def get_config() -> ConfigDict:
    """The run's config."""
    c = default_config()
    c.objective = "scfm"
    c.train = "lora"
    c.init_from = "runs/digits-teacher"
    c.lora.rank, c.lora.alpha = 16, 16.0
    c.teacher_share, c.teacher_grid = 0.4, 32
    c.rows.self_rows, c.rows.flow_rows = 1, 0
    c.student_weights = (1.0, 1.25, 1.7, 1.6, 1.9, 1.8, 2.3, 2.3)
    c.shift.low, c.shift.high = 0.7, 1.4
    c.steps = 600
    c.batch_size = 128
    c.model.preset = "digits"
    c.mesh.data, c.mesh.fsdp = -1, 1
    c.optimizer.learning_rate = 2e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.b2 = 0.99
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 10.0
    c.ema.warmup = True
    c.data.caption_dropout = 0.0
    c.eval.views, c.eval.images = ("teacher", "slow"), (0, 0)
    return c


def get_teacher_config() -> ConfigDict:
    """The run that is made first where `init_from` is not found: plain flow matching."""
    c = runpy.run_path(str(Path(__file__).with_name("digits.py")))["get_config"]()
    c.objective = "flow"
    # Of no use to flow:
    c.multistep_start, c.student_weights, c.jumps, c.timestep_range = 1.0, (), 2, (0.0, 1.0)
    c.steps = 3000
    c.optimizer.learning_rate = 3e-3
    c.eval.views, c.eval.images = ("slow",), (0,)
    return c
