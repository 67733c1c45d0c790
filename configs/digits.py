"""The embedded default: a 1.4 M parameter Flux on 1,797 real handwritten digits, 8 x 8 pixels.

python -m shortcut_jax.train --config=configs/digits.py

"""

from ml_collections import ConfigDict

from shortcut_jax.settings import default_config


def get_config() -> ConfigDict:
    """The run's config."""
    c = default_config()
    c.objective = "scfm"
    c.steps = 1000
    c.batch_size = 64
    c.model.preset = "digits"
    c.mesh.data, c.mesh.fsdp = -1, 1
    c.optimizer.learning_rate = 2e-3
    c.optimizer.b2 = 0.99
    c.optimizer.weight_decay = 0.01
    c.optimizer.warmup_steps = 50
    c.optimizer.schedule = "cosine"
    c.ema.warmup = True
    c.data.caption_dropout = 0.05
    c.student_weights = (1.0, 1.4, 2.0, 2.0, 2.5, 2.5, 3.5, 3.5)
    return c
