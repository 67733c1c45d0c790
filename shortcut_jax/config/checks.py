"""Configs against devices: every range and divisibility check, its numbers in the message, before any compilation."""

import re
import typing

from shortcut_jax.config.check_values import check_values
from shortcut_jax.config.derive import model_config
from shortcut_jax.config.fields import fields_of
from shortcut_jax.config.resume import flatten
from shortcut_jax.config.schema import Settings, build, check_paths, to_dict
from shortcut_jax.core.schedules import weights_for_share
from shortcut_jax.data.records import STORES, stride_of
from shortcut_jax.errors import ConfigError, one_of, require
from shortcut_jax.models.attention import BACKENDS
from shortcut_jax.models.flux import REMAT_POLICIES, FluxConfig
from shortcut_jax.runtime.profiling import parse_steps
from shortcut_jax.steps.networks import GUIDANCE_MODES, TEACHER, VIEWS
from shortcut_jax.steps.objectives import OBJECTIVES
from shortcut_jax.steps.optim import SCHEDULES
from shortcut_jax.steps.validation_loss import RULES

DTYPES = ("float32", "bfloat16", "float16")

_TAKE_TEACHER = " or ".join(name for name, row in OBJECTIVES.items() if row.takes_teacher)
_TAKE_ROLLED = " or ".join(name for name, row in OBJECTIVES.items() if row.of_rolled_rows)
_PATHS = ("optimizer.decay_paths", "lora.paths")


def from_config(config: typing.Any) -> Settings:
    """Freezes and checks a ConfigDict (or plain nested dicts, as stored in a checkpoint).

    Raises:
      ConfigError: an unknown, missing or wrongly typed key, or a value out of range.
      PathError: a path that is not one of this machine.
    """
    settings = build(config)
    check_paths(settings)
    _check(settings)
    return settings


def _check(s: Settings) -> None:
    values = flatten(to_dict(s))
    check_values(values)
    one_of("objective", s.objective, OBJECTIVES)
    one_of("timestep", s.timestep, ("uniform", "logit_normal"))
    one_of("model.remat", s.model.remat, (*REMAT_POLICIES, "auto"))
    one_of("model.attention", s.model.attention, BACKENDS)
    one_of("optimizer.schedule", s.optimizer.schedule, SCHEDULES)
    one_of("data.store", s.data.store, STORES)
    one_of("data.text_encoder", s.data.text_encoder, ("words", "stored"))
    one_of("data.text_states", s.data.text_states, ("full", "trimmed"))
    one_of("validation.rule", s.validation.rule, RULES)
    one_of("eval.view", s.eval.view, VIEWS)
    one_of("init_view", s.init_view, VIEWS)
    one_of("train", s.train, ("all", "lora"))
    one_of("guidance_mode", s.guidance_mode, GUIDANCE_MODES)
    one_of("multistep_times", s.multistep_times, ("first", "all"))
    for name in ("model.compute_dtype", "model.param_dtype", "grad_reduce_dtype"):
        one_of(name, values[name], DTYPES)
    require(
        s.model.matmul_dtype in (None, "float8"),
        f"model.matmul_dtype is {s.model.matmul_dtype!r}, but must be float8, or None for model.compute_dtype",
    )
    require(
        s.model.matmul_dtype is None or not OBJECTIVES[s.objective].forward_mode,
        f"model.matmul_dtype=float8 has no forward-mode derivative, as objective={s.objective} needs: leave it None",
    )
    for name, field in fields_of(s).items():
        if within := field.metadata.get("within"):
            require(within.holds(values[name]), f"{name} is {values[name]}, but must {within.text}")
    _check_student(s)
    _check_faults(s)
    _check_evaluation(s)
    _check_data(s)
    _check_profile(s)
    for name in _PATHS:
        try:
            re.compile(values[name])
        except re.error as error:
            raise ConfigError(f"{name} is {values[name]!r}, which is not a regular expression: {error}") from None
    require(s.ema.warmup_ratio >= 1, f"ema.warmup_ratio is {s.ema.warmup_ratio:g}, but must be at least 1")
    require(
        (s.batch_size is None) != (s.batch_per_device is None),
        f"give exactly one of batch_size and batch_per_device, not {s.batch_size} and {s.batch_per_device}",
    )
    _check_post_training(s)
    _check_guidance(s, model_config(s, "cpu", check_backend=False))


def _check_data(s: Settings) -> None:
    d = s.data
    require(
        d.store != "pixels" or d.text_encoder == "words",
        "data.text_encoder is 'stored', but data.store 'pixels' has no stored text states: set data.text_encoder=words",
    )
    require(
        d.store == "pixels" or not d.flip,
        f"data.flip is {d.flip}, but {d.store} cannot be mirrored"
        f"{' (the autoencoder is not symmetric)' if d.store == 'latents' else ''}: set data.flip=0",
    )
    rolled = OBJECTIVES[s.objective].of_rolled_rows is not None and s.rows.size == s.rows.rolled_rows
    require(
        d.store != "captions" or rolled,
        f"data.store is 'captions', so that there are no images for self and flow rows: set objective={_TAKE_ROLLED}, "
        f"rows.self_rows=0, rows.flow_rows=0 and rows.rolled_rows=1",
    )
    require(
        d.store != "captions" or not (s.validation.every or s.validation.every_samples),
        "data.store is 'captions', but a validation loss needs images: set validation.every=0",
    )
    require(d.stride is None or d.stride >= 1, f"data.stride is {d.stride}, but must be at least 1")
    require(
        d.height % stride_of(d) == 0 and d.width % stride_of(d) == 0,
        f"data {d.height} x {d.width} is not a multiple of the {stride_of(d)} pixels of a latent (data.stride)",
    )
    sets = (d.name, *d.mix)
    require(len(set(sets)) == len(sets), f"data.mix: the set {d.name!r} or another one is named twice in {sets}")
    require(
        len(d.weights) in (0, len(sets)) and all(w > 0 for w in d.weights),
        f"data.weights is {d.weights}, but must be a positive number for each of {', '.join(sets)}, or none",
    )


def _check_post_training(s: Settings) -> None:
    require(
        not s.has_base or s.init_from is not None or s.base is not None,
        f"{'train=lora' if s.train == 'lora' else f'teacher_share={s.teacher_share}'} needs pretrained weights: "
        f"set init_from (or base) to a checkpoint, such as a converted FLUX.1 or the workdir of a run",
    )
    require(
        s.train == "all" or not OBJECTIVES[s.objective].needs_step_size,
        f"objective={s.objective} has a step-size embedding that no base has, and trains all weights: set train=all",
    )
    require(s.has_base or s.base is None, f"base={s.base}, but nothing is frozen: set train=lora, or init_from instead")
    require(
        s.teacher_lora is None or (s.train == "lora" and s.teacher_share > 0),
        f"teacher_lora={s.teacher_lora} goes with train=lora and a teacher_share above 0",
    )
    if not s.teacher_share:
        return
    require(
        OBJECTIVES[s.objective].takes_teacher,
        f"teacher_share is {s.teacher_share}, but objective={s.objective} has no rows to learn from a teacher: set "
        f"objective={_TAKE_TEACHER}, or teacher_share=0",
    )
    require(
        s.rows.distilled > 0,
        f"teacher_share is {s.teacher_share}, but a batch has no rows to learn from a teacher: set rows.self_rows or "
        "rows.rolled_rows to at least 1",
    )
    grid, jumps, finest = s.teacher_grid, s.jumps, max(s.student_steps)
    require(
        grid >= jumps and grid % jumps == 0,
        f"teacher_grid is {grid}, but must be a multiple of jumps={jumps}: a student step is {jumps} teacher steps",
    )
    require(
        finest * jumps <= grid,
        f"student_steps has {finest}, whose targets take {finest * jumps} steps (jumps={jumps}), finer than the "
        f"teacher's grid of {grid}: drop it, or set teacher_grid to at least {finest * jumps}",
    )


def _check_guidance(s: Settings, model: FluxConfig) -> None:
    require(
        len(s.guidance) in (0, 2) and list(s.guidance) == sorted(s.guidance),
        f"guidance is {s.guidance}, but must be (low, high) with low <= high",
    )
    if s.guidance_mode == "embedded":
        require(
            model.guidance or not s.guidance,
            f"guidance is {s.guidance}, but {s.model.preset} has no guidance embedding to take it: set guidance=(), "
            f"or guidance_mode=cfg for classifier-free guidance in student and targets, or guidance_mode=distill with "
            f"model.guidance=true to distil it into an embedding",
        )
        return
    require(bool(s.guidance), f"guidance_mode={s.guidance_mode} needs a range of scales: set guidance=(low, high)")
    require(
        OBJECTIVES[s.objective].takes_teacher,
        f"guidance_mode={s.guidance_mode} guides the targets of objective={_TAKE_TEACHER}, not those of {s.objective}: "
        "set guidance_mode=embedded",
    )
    needs = GUIDANCE_MODES[s.guidance_mode].distils
    require(
        model.guidance == needs,
        f"guidance_mode={s.guidance_mode} {'needs a' if needs else 'goes with a model without'} guidance embedding: "
        f"set model.guidance={'false' if model.guidance else 'true'}",
    )
    require(
        s.guidance_mode != "distill" or s.teacher_share > 0,
        "guidance_mode=distill needs a teacher: set teacher_share above 0",
    )


def _check_student(s: Settings) -> None:
    counts, weights = s.student_steps, s.student_weights
    require(bool(counts) and min(counts) >= 1, f"student_steps is {counts}, but must be step counts of at least 1")
    require(len(set(counts)) == len(counts), f"student_steps {counts} names a step count twice")
    require(
        len(weights) in (0, len(counts)),
        f"student_weights has {len(weights)} entries for {len(counts)} step counts: give one each, or none",
    )
    require(all(w >= 0 for w in weights) and (not weights or sum(weights) > 0), f"student_weights is {weights}")
    if s.one_step_share is not None:
        require(not weights, "student_weights and one_step_share both say how often one step is drawn: give one")
        try:
            weights_for_share(counts, s.one_step_share)
        except ValueError as error:
            raise ConfigError(f"one_step_share: {error}") from None
    times = s.timestep_range
    require(
        len(times) == 2 and 0 <= times[0] < times[1] <= 1,
        f"timestep_range is {times}, but must be two times, 0 <= low < high <= 1",
    )
    require(
        0.9 <= s.multistep_start <= 1,
        f"multistep_start is {s.multistep_start:g}, but must be from 0.9, so that it is still noise, to 1",
    )
    require(s.jumps >= 2 and s.jumps % 2 == 0, f"jumps is {s.jumps}, but must be an even number of at least 2")
    require(0 < s.shift.low <= s.shift.high, f"shift is {s.shift.low} to {s.shift.high}: need 0 < low <= high")
    require(
        not OBJECTIVES[s.objective].distils or s.rows.size > 0,
        "rows.self_rows + rows.rolled_rows + rows.flow_rows is 0, but a group needs rows",
    )
    row = OBJECTIVES[s.objective]
    require(
        not row.distils or row.of_rolled_rows is not None or not s.rows.rolled_rows,
        f"rows.rolled_rows is {s.rows.rolled_rows}, but objective={s.objective} has no such rows: set it to 0, or "
        f"objective={_TAKE_ROLLED}",
    )
    require(
        not row.distils or s.rows.rolled_rows < s.rows.size or s.has_base or s.init_from is not None,
        "rolled rows alone distil a model that is there already, not random weights: set init_from, or rows.flow_rows "
        "to at least 1",
    )
    a = s.alpha
    require(
        0 < a.last <= a.first <= 1 and 0 < a.until <= 1,
        f"alpha falls from {a.first} to {a.last} until {a.until} of the run, but need 0 < last <= first <= 1 and "
        f"0 < until <= 1",
    )


def _check_evaluation(s: Settings) -> None:
    e = s.eval
    require(bool(e.steps) and min(e.steps) >= 1, f"eval.steps is {e.steps}, but step counts must be at least 1")
    require(bool(e.seeds), "eval.seeds is empty: name at least one noise seed")
    require(min(e.seeds) >= 0, f"eval.seeds is {e.seeds}, but seeds must not be negative")
    for name, views in (("eval.views", e.views), ("validation.views", s.validation.views)):
        for view in views:
            one_of(name, view, (*VIEWS, TEACHER) if s.has_base else VIEWS)
    require(bool(s.validation.views), "validation.views is empty: name at least one view")
    require(0 in (s.validation.every, s.validation.every_samples), "give one of validation.every and .every_samples")
    require(len(e.images) == len(e.views), f"eval.images {e.images} and eval.views {e.views} must have one entry each")
    require(all(n == 0 or n >= 2 for n in e.images), f"eval.images is {e.images}: a view needs 0 (all) or at least 2")


def _check_faults(s: Settings) -> None:
    """Raises ConfigError for values that do not go together."""
    if 0 < s.spikes.factor <= 1:
        raise ConfigError(f"spikes.factor is {s.spikes.factor}, but many good steps are above the mean: set 2 or more")
    if s.spikes.factor and not s.max_skipped:
        raise ConfigError("max_skipped is 0, so that the first spike would stop the run: set max_skipped to 1 or more")
    if s.watchdog.seconds > s.watchdog.slow_seconds:
        raise ConfigError(
            f"watchdog.seconds is {s.watchdog.seconds:g}, more than watchdog.slow_seconds={s.watchdog.slow_seconds:g}"
        )
    if not 2 <= s.peer_timeout <= 90:
        raise ConfigError(
            f"peer_timeout is {s.peer_timeout:g}, but must be in [2, 90]: after 100 s JAX aborts the processes itself"
        )


def _check_profile(s: Settings) -> None:
    """Raises ConfigError where `profile_steps` names no steps, or steps that the run does not have."""
    try:
        steps = parse_steps(s.profile_steps)
    except ValueError as error:
        raise ConfigError(f"profile_steps {error}") from None
    if steps and steps[-1] > s.steps:
        raise ConfigError(
            f"profile_steps is {s.profile_steps!r}, but the run has {s.steps} steps: END is at most {s.steps + 1}"
        )
