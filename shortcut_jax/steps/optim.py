"""The optimizer: AdamW with a schedule, clipping and a decay mask by path."""

from dataclasses import dataclass

import optax

from shortcut_jax.core.setting import DECAY, NOT_NEGATIVE, POSITIVE, SCHEDULE, setting
from shortcut_jax.core.tree import match_tree

SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning rate.

    Attributes:
      learning_rate: peak rate.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: Adam's epsilon.
      weight_decay: decoupled weight decay, on parameters whose path matches `decay_paths`.
      decay_paths: regular expression over the whole path, such as `.*/kernel`; adapters are `.*/[ab]`.
      clip_norm: global gradient norm above which gradients are scaled down; 0 means no clipping.
      warmup_steps: steps of linear warm-up from 0.
      schedule: `constant`, or `cosine` down to 0 at the last step, after the warm-up.
    """

    learning_rate: float = setting(2e-4, POSITIVE)
    b1: float = setting(0.9, DECAY)
    b2: float = setting(0.95, DECAY)
    eps: float = setting(1e-8, POSITIVE)
    weight_decay: float = setting(0.1, NOT_NEGATIVE)
    decay_paths: str = ".*/kernel"
    clip_norm: float = setting(1.0, NOT_NEGATIVE)
    warmup_steps: int = setting(0, NOT_NEGATIVE, resume=SCHEDULE)
    schedule: str = "constant"


def make_schedule(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """The learning rate by optimizer step, for a run of `steps`."""
    if settings.schedule == "cosine":
        after = optax.cosine_decay_schedule(settings.learning_rate, max(steps - settings.warmup_steps, 1))
    else:
        after = optax.constant_schedule(settings.learning_rate)
    if not settings.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, settings.learning_rate, settings.warmup_steps)
    return optax.join_schedules([warmup, after], [settings.warmup_steps])


def make_optimizer(settings: OptimizerSettings, steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW. The weight-decay mask is computed from the parameters' paths."""
    decayed = ((settings.decay_paths, True), (".*", False))
    adamw = optax.adamw(
        make_schedule(settings, steps),
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=lambda params: match_tree(decayed, params),
    )
    clip = optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity()
    return optax.chain(clip, adamw)
