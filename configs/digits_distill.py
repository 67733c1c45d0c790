"""Post-training on the embedded default: adapters that make a trained digits model need few steps.

Command:  python -m shortcut_jax.train --config=configs/digits_distill.py
Hardware: two CPU cores.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from shortcut_jax.settings import default_config


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
    """The run that is made first where `init_from` is not there: plain flow matching."""
    c = runpy.run_path(str(Path(__file__).with_name("digits.py")))["get_config"]()
    c.objective = "flow"
    c.steps = 3000
    c.optimizer.learning_rate = 3e-3
    c.eval.views, c.eval.images = ("slow",), (0,)
    return c
