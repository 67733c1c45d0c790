"""Fields of a config that a run does not use, in one table: what was set for nothing is named before the first step."""

import re
from collections.abc import Callable

from shortcut_jax.config.resume import flatten
from shortcut_jax.config.schema import Settings, to_dict
from shortcut_jax.steps.objectives import OBJECTIVES


def _no_distillation(s: Settings) -> str:
    return "" if OBJECTIVES[s.objective].distils else f"objective={s.objective}"


def _no_self_rows(s: Settings) -> str:
    return _no_distillation(s) or ("" if s.rows.distilled else "rows.self_rows=0")


def _no_student_steps(s: Settings) -> str:
    return _no_self_rows(s) or (f"objective={s.objective}" if OBJECTIVES[s.objective].any_interval else "")


def _told_step_size(s: Settings) -> str:
    return f"objective={s.objective}" if OBJECTIVES[s.objective].needs_step_size else ""


def _no_student_rows(s: Settings) -> str:
    return _no_student_steps(s) or ("teacher_share=1" if s.teacher_share == 1 else "")


def _no_flow_rows(s: Settings) -> str:
    return "" if _no_distillation(s) or s.rows.flow_rows else "rows.flow_rows=0"


def _no_drawn_times(s: Settings) -> str:
    return _no_flow_rows(s) if _no_student_steps(s) == _no_self_rows(s) else ""


def _no_validation(s: Settings) -> str:
    return "" if s.validation.every or s.validation.every_samples else "validation.every=0"


WHY_UNUSED: tuple[tuple[str, Callable[[Settings], str]], ...] = (
    (r"lora\..*", lambda s: "" if s.train == "lora" else f"train={s.train}"),
    (r"model\.param_dtype", lambda s: "train=lora" if s.train == "lora" else ""),
    (r"init_view", lambda s: "" if s.init_from or s.base else "init_from=None"),
    (r"teacher_grid", lambda s: "" if s.teacher_share else "teacher_share=0"),
    (r"rows\..*", _no_distillation),
    (r"student_(steps|weights)|one_step_share", _no_student_rows),
    (r"multistep_(start|times)", lambda s: _no_self_rows(s) or _told_step_size(s)),
    (r"multistep_times", lambda s: "multistep_start=1" if s.multistep_start == 1 else ""),
    (r"jumps|shift\..*", _no_student_steps),
    (r"rolled_steps", lambda s: _no_distillation(s) or ("" if s.rows.rolled_rows else "rows.rolled_rows=0")),
    (r"alpha\..*", lambda s: "" if OBJECTIVES[s.objective].takes_alpha else f"objective={s.objective}"),
    (r"timestep_range", lambda s: _no_distillation(s) or _no_flow_rows(s)),
    (r"timestep", _no_drawn_times),
    (r"data\.weights", lambda s: "" if s.data.mix else "data.mix=()"),
    (r"data\.text_states", lambda s: "data.text_encoder=words" if s.data.text_encoder == "words" else ""),
    (r"optimizer\.decay_paths", lambda s: "" if s.optimizer.weight_decay else "optimizer.weight_decay=0"),
    (r"ema\.(fast|warmup_ratio)", lambda s: "" if s.ema.dual else "ema.dual=False"),
    (r"ema\.warmup_ratio", lambda s: "" if s.ema.warmup else "ema.warmup=False"),
    (r"spikes\.(after|decay)", lambda s: "" if s.spikes.factor else "spikes.factor=0"),
    (r"watchdog\.(slow|grace)_seconds", lambda s: "" if s.watchdog.seconds else "watchdog.seconds=0"),
    (r"eval\.(seeds|batch_size)", lambda s: "" if s.eval.views else "eval.views=()"),
    (r"validation\.(name|split|rule|images|views|seed)", _no_validation),
)
"""Fields -> the setting for which a run does not use them, or nothing where it does. All others are always used."""


def unused(s: Settings) -> list[str]:
    """A line for each setting for which fields are unused that differ from their defaults."""
    values, defaults = flatten(to_dict(s)), flatten(to_dict(Settings()))
    found: dict[str, list[str]] = {}
    for name, value in values.items():
        reasons = [why(s) for pattern, why in WHY_UNUSED if re.fullmatch(pattern, name)]
        if value != defaults[name] and any(reasons):
            found.setdefault(next(filter(None, reasons)), []).append(name)
    return [f"unused with {reason}: {', '.join(names)}" for reason, names in found.items()]
