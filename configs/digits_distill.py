"""Post-training on the embedded default: adapters that make a trained digits model need few steps.

Command:  python -m shortcut_jax.train --config=configs/digits_distill.py
Hardware: two CPU cores, 2 GB.
Time:     about 3 minutes for 600 steps, and about 12 before them for the teacher, where runs/digits-teacher is absent.
Expected: slow EMA at 1 / 2 / 3 / 4 / 8 / 32 steps, with a teacher of 1,000 steps (this command trains one of 3,000;
          docs/post-training.md has the commands of these figures): a Frechet distance of
          0.90 / 0.52 / 0.32 / 0.30 / 0.26 / 0.26, where the teacher has 5.94 / 2.06 / 1.15 / 0.82 / 0.44 / 0.28
          (means of three training seeds; docs/objectives.md).

A quarter of the rows are flow rows, below t = 0.9: they preserve sampling in many steps, which self rows alone lose
(1.01 at 32 steps). They need images: for ten of them see configs/digits_fewshot.py. 82% of the self rows at t = 1 learn
one step, and targets are made of steps four times smaller.
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
    c.teacher_share, c.teacher_grid = 0.4, 64
    c.rows.self_rows, c.rows.flow_rows = 3, 1
    c.timestep_range = (0.0, 0.9)
    c.one_step_share = 0.82
    c.jumps = 4
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
