"""Configs against devices: every range and divisibility check, its numbers in the message, before any compilation."""

import dataclasses
import math
import re
import typing

from shortcut_jax.config.check_faults import check_faults
from shortcut_jax.config.check_profile import check_profile
from shortcut_jax.config.check_values import check_values
from shortcut_jax.config.resume import flatten
from shortcut_jax.config.schema import Settings, build, check_paths, to_dict
from shortcut_jax.core.schedules import StudentSteps, weights_for_share
from shortcut_jax.data.records import STORES, latent_size, stride_of
from shortcut_jax.errors import ConfigError
from shortcut_jax.models.attention import BACKENDS, choose_backend
from shortcut_jax.models.flux import REMAT_POLICIES, FluxConfig
from shortcut_jax.models.presets import preset
from shortcut_jax.runtime.sharding import MESH_AXES, MeshShape
from shortcut_jax.steps.networks import GUIDES, TEACHER, VIEWS
from shortcut_jax.steps.objectives import OBJECTIVES, ObjectiveSettings, row_group
from shortcut_jax.steps.optim import SCHEDULES
from shortcut_jax.steps.train_step import StepSettings
from shortcut_jax.steps.validation_loss import RULES

EMBEDDED_GUIDANCE = (0.0, 7.5)
"""The range that models with a guidance embedding are told by default, as published for FLUX.1 dev."""

DTYPES = ("float32", "bfloat16", "float16")

_AT_LEAST_ONE = (
    *("steps", "accumulate", "log_every", "keep", "save_attempts", "data.text_tokens", "rolled_steps"),
    *("eval.batch_size", "eval.columns", "model.scan_unroll", "lora.rank", "data.threads"),
)
_NOT_NEGATIVE = (
    *("seed", "max_skipped", "sample_every", "checkpoint_every"),
    *("rows.self_rows", "rows.flow_rows", "rows.rolled_rows", "data.limit", "data.workers"),
    *("validation.every", "validation.every_samples", "validation.images", "validation.seed", "mesh.min_shard"),
    *("ema.restart_every", "optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.clip_norm"),
    *("spikes.factor", "spikes.after", "watchdog.seconds", "watchdog.slow_seconds", "watchdog.grace_seconds"),
)
_POSITIVE = (
    *("optimizer.learning_rate", "optimizer.eps", "eval.shift", "lora.alpha"),
    "heartbeat_every",
)
_TAKE_TEACHER = " or ".join(name for name, row in OBJECTIVES.items() if row.takes_teacher)
_TAKE_ROLLED = " or ".join(name for name, row in OBJECTIVES.items() if row.of_rolled_rows)
_DECAYS = ("ema.fast", "ema.slow", "spikes.decay", "optimizer.b1", "optimizer.b2")
_PROBABILITIES = ("data.caption_dropout", "data.flip", "shift.dynamic", "teacher_share")
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


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _one_of(name: str, value: str, choices: typing.Iterable[str]) -> None:
    _require(value in tuple(choices), f"{name} is {value!r}, but must be one of {', '.join(choices)}")


def _check(s: Settings) -> None:
    values = flatten(to_dict(s))
    check_values(values)
    _one_of("objective", s.objective, OBJECTIVES)
    _one_of("timestep", s.timestep, ("uniform", "logit_normal"))
    _one_of("model.remat", s.model.remat, REMAT_POLICIES)
    _one_of("model.attention", s.model.attention, BACKENDS)
    _one_of("optimizer.schedule", s.optimizer.schedule, SCHEDULES)
    _one_of("data.store", s.data.store, STORES)
    _one_of("data.text_encoder", s.data.text_encoder, ("words", "stored"))
    _one_of("data.text_states", s.data.text_states, ("full", "trimmed"))
    _one_of("validation.rule", s.validation.rule, RULES)
    _one_of("eval.view", s.eval.view, VIEWS)
    _one_of("init_view", s.init_view, VIEWS)
    _one_of("train", s.train, ("all", "lora"))
    _one_of("guide", s.guide, GUIDES)
    for name in ("model.compute_dtype", "model.param_dtype", "grad_reduce_dtype"):
        _one_of(name, values[name], DTYPES)
    for name in _AT_LEAST_ONE:
        _require(values[name] >= 1, f"{name} is {values[name]}, but must be at least 1")
    for name in _NOT_NEGATIVE:
        _require(values[name] >= 0, f"{name} is {values[name]}, but must not be negative")
    for name in _POSITIVE:
        _require(values[name] > 0, f"{name} is {values[name]}, but must be positive")
    for name in _DECAYS:
        _require(0.0 <= values[name] < 1.0, f"{name} is {values[name]}, but must be in [0, 1)")
    for name in _PROBABILITIES:
        _require(0.0 <= values[name] <= 1.0, f"{name} is {values[name]}, but must be in [0, 1]")
    _check_student(s)
    check_faults(s)
    _check_evaluation(s)
    _check_data(s)
    check_profile(s)
    for name in _PATHS:
        try:
            re.compile(values[name])
        except re.error as error:
            raise ConfigError(f"{name} is {values[name]!r}, which is not a regular expression: {error}") from None
    _require(s.ema.warmup_ratio >= 1, f"ema.warmup_ratio is {s.ema.warmup_ratio:g}, but must be at least 1")
    _require(
        (s.batch_size is None) != (s.batch_per_device is None),
        f"give exactly one of batch_size and batch_per_device, not {s.batch_size} and {s.batch_per_device}",
    )
    _check_post_training(s)
    _check_guidance(s, model_config(s, "cpu", check_backend=False))


def _check_data(s: Settings) -> None:
    d = s.data
    _require(
        d.store != "pixels" or d.text_encoder == "words",
        "data.text_encoder is 'stored', but data.store 'pixels' has no stored text states: set data.text_encoder=words",
    )
    _require(
        d.store == "pixels" or not d.flip,
        f"data.flip is {d.flip}, but {d.store} cannot be mirrored"
        f"{' (the autoencoder is not symmetric)' if d.store == 'latents' else ''}: set data.flip=0",
    )
    rolled = OBJECTIVES[s.objective].of_rolled_rows is not None and s.rows.size == s.rows.rolled_rows
    _require(
        d.store != "captions" or rolled,
        f"data.store is 'captions', so that there are no images for self and flow rows: set objective={_TAKE_ROLLED}, "
        f"rows.self_rows=0, rows.flow_rows=0 and rows.rolled_rows=1",
    )
    _require(
        d.store != "captions" or not (s.validation.every or s.validation.every_samples),
        "data.store is 'captions', but a validation loss needs images: set validation.every=0",
    )
    _require(d.stride is None or d.stride >= 1, f"data.stride is {d.stride}, but must be at least 1")
    _require(
        d.height % stride_of(d) == 0 and d.width % stride_of(d) == 0,
        f"data {d.height} x {d.width} is not a multiple of the {stride_of(d)} pixels of a latent (data.stride)",
    )
    sets = (d.name, *d.mix)
    _require(len(set(sets)) == len(sets), f"data.mix: the set {d.name!r} or another one is named twice in {sets}")
    _require(
        len(d.weights) in (0, len(sets)) and all(w > 0 for w in d.weights),
        f"data.weights is {d.weights}, but must be a positive number for each of {', '.join(sets)}, or none",
    )


def _check_post_training(s: Settings) -> None:
    _require(
        not s.has_base or s.init_from is not None or s.base is not None,
        f"{'train=lora' if s.train == 'lora' else f'teacher_share={s.teacher_share}'} needs pretrained weights: "
        f"set init_from (or base) to a checkpoint, such as a converted FLUX.1 or the workdir of a run",
    )
    _require(
        s.train == "all" or not OBJECTIVES[s.objective].needs_step_size,
        f"objective={s.objective} has a step-size embedding that no base has, and trains all weights: set train=all",
    )
    _require(
        s.has_base or s.base is None, f"base={s.base}, but nothing is frozen: set train=lora, or init_from instead"
    )
    _require(
        s.teacher_lora is None or (s.train == "lora" and s.teacher_share > 0),
        f"teacher_lora={s.teacher_lora} goes with train=lora and a teacher_share above 0",
    )
    if not s.teacher_share:
        return
    _require(
        OBJECTIVES[s.objective].takes_teacher and s.rows.distilled > 0,
        f"teacher_share is {s.teacher_share}, but objective={s.objective} with rows.self_rows={s.rows.self_rows} has "
        f"no rows to learn from a teacher: set objective={_TAKE_TEACHER} and rows.self_rows to at least 1",
    )
    grid, jumps, finest = s.teacher_grid, s.jumps, max(s.student_steps)
    _require(
        grid >= jumps and grid % jumps == 0,
        f"teacher_grid is {grid}, but must be a multiple of jumps={jumps}: a student step is {jumps} teacher steps",
    )
    _require(
        finest * jumps <= grid,
        f"student_steps has {finest}, whose targets take {finest * jumps} steps (jumps={jumps}), finer than the "
        f"teacher's grid of {grid}: drop it, or set teacher_grid to at least {finest * jumps}",
    )


def _check_guidance(s: Settings, model: FluxConfig) -> None:
    _require(
        len(s.guidance) in (0, 2) and list(s.guidance) == sorted(s.guidance),
        f"guidance is {s.guidance}, but must be (low, high) with low <= high",
    )
    if s.guide == "told":
        _require(
            model.guidance or not s.guidance,
            f"guidance is {s.guidance}, but {s.model.preset} has no guidance embedding to be told it: set guidance=(), "
            f"or guide=both for classifier-free guidance in student and targets, or guide=teacher with "
            f"model.guidance=true to distil it into an embedding",
        )
        return
    _require(bool(s.guidance), f"guide={s.guide} needs a range of scales: set guidance=(low, high)")
    _require(
        OBJECTIVES[s.objective].takes_teacher,
        f"guide={s.guide} needs objective={_TAKE_TEACHER}, not {s.objective}",
    )
    _require(
        model.guidance == (s.guide != "both"),
        f"guide={s.guide} {'needs a' if s.guide != 'both' else 'goes with a model without'} guidance embedding: set "
        f"model.guidance={'false' if model.guidance else 'true'}",
    )
    _require(
        s.guide != "teacher" or s.teacher_share > 0,
        "guide=teacher needs a teacher: set teacher_share above 0",
    )


def _check_student(s: Settings) -> None:
    counts, weights = s.student_steps, s.student_weights
    _require(bool(counts) and min(counts) >= 1, f"student_steps is {counts}, but must be step counts of at least 1")
    _require(len(set(counts)) == len(counts), f"student_steps {counts} names a step count twice")
    _require(
        len(weights) in (0, len(counts)),
        f"student_weights has {len(weights)} entries for {len(counts)} step counts: give one each, or none",
    )
    _require(all(w >= 0 for w in weights) and (not weights or sum(weights) > 0), f"student_weights is {weights}")
    if s.one_step_share is not None:
        _require(not weights, "student_weights and one_step_share both say how often one step is drawn: give one")
        try:
            weights_for_share(counts, s.one_step_share)
        except ValueError as error:
            raise ConfigError(f"one_step_share: {error}") from None
    times = s.timestep_range
    _require(
        len(times) == 2 and 0 <= times[0] < times[1] <= 1,
        f"timestep_range is {times}, but must be two times, 0 <= low < high <= 1",
    )
    _require(
        0.9 <= s.multistep_start <= 1,
        f"multistep_start is {s.multistep_start:g}, but must be from 0.9, so that it is still noise, to 1",
    )
    _require(s.jumps >= 2 and s.jumps % 2 == 0, f"jumps is {s.jumps}, but must be an even number of at least 2")
    _require(0 < s.shift.low <= s.shift.high, f"shift is {s.shift.low} to {s.shift.high}: need 0 < low <= high")
    _require(
        not OBJECTIVES[s.objective].distils or s.rows.size > 0,
        "rows.self_rows + rows.rolled_rows + rows.flow_rows is 0, but a group needs rows",
    )
    row = OBJECTIVES[s.objective]
    _require(
        not row.distils or row.of_rolled_rows is not None or not s.rows.rolled_rows,
        f"rows.rolled_rows is {s.rows.rolled_rows}, but objective={s.objective} has no such rows: set it to 0, or "
        f"objective={_TAKE_ROLLED}",
    )
    _require(
        not row.distils or s.rows.rolled_rows < s.rows.size or s.has_base or s.init_from is not None,
        "rolled rows alone distil a model that is there already, not random weights: set init_from, or rows.flow_rows "
        "to at least 1",
    )
    a = s.alpha
    _require(
        0 < a.last <= a.first <= 1 and 0 < a.until <= 1,
        f"alpha falls from {a.first} to {a.last} until {a.until} of the run, but need 0 < last <= first <= 1 and "
        f"0 < until <= 1",
    )


def _check_evaluation(s: Settings) -> None:
    e = s.eval
    _require(bool(e.steps) and min(e.steps) >= 1, f"eval.steps is {e.steps}, but step counts must be at least 1")
    _require(bool(e.seeds), "eval.seeds is empty: name at least one noise seed")
    _require(min(e.seeds) >= 0, f"eval.seeds is {e.seeds}, but seeds must not be negative")
    for name, views in (("eval.views", e.views), ("validation.views", s.validation.views)):
        for view in views:
            _one_of(name, view, (*VIEWS, TEACHER) if s.has_base else VIEWS)
    _require(bool(s.validation.views), "validation.views is empty: name at least one view")
    _require(0 in (s.validation.every, s.validation.every_samples), "give one of validation.every and .every_samples")
    _require(len(e.images) == len(e.views), f"eval.images {e.images} and eval.views {e.views} must have one entry each")
    _require(all(n == 0 or n >= 2 for n in e.images), f"eval.images is {e.images}: a view needs 0 (all) or at least 2")


def model_config(s: Settings, platform: str, check_backend: bool = True) -> FluxConfig:
    """The network's config on a platform (see `choose_backend`), without a mesh.

    Raises:
      ConfigError: an unknown preset, a geometry that does not fit together, or an attention backend that cannot run.
    """
    m = s.model
    names = ("double_blocks", "single_blocks", "width", "heads", "axes", "guidance")
    overrides = {n: getattr(m, n) for n in names if getattr(m, n) is not None}
    try:
        cfg = preset(m.preset)
    except ValueError as error:
        raise ConfigError(f"model.preset: {error}") from None
    cfg = dataclasses.replace(
        cfg,
        **overrides,
        step_size=OBJECTIVES[s.objective].needs_step_size,
        compute_dtype=m.compute_dtype,
        param_dtype=m.param_dtype,
        grad_reduce_dtype=s.grad_reduce_dtype,
        remat=m.remat,
        scan_unroll=m.scan_unroll,
    )
    _require(
        cfg.width > 0 and cfg.heads > 0 and cfg.width % cfg.heads == 0,
        f"model width {cfg.width} is not a multiple of its {cfg.heads} heads",
    )
    _require(
        len(cfg.axes) == 3 and sum(cfg.axes) == cfg.head_size and all(a % 2 == 0 and a > 0 for a in cfg.axes),
        f"head size {cfg.head_size} (width {cfg.width} / heads {cfg.heads}) does not match the RoPE axes {cfg.axes}: "
        f"three even numbers that sum to the head size",
    )
    _require(cfg.double_blocks >= 0 and cfg.single_blocks >= 0, "model.double_blocks and single_blocks are counts")
    height, width = latent_size(s.data)
    _require(
        height >= 2 and width >= 2 and height % 2 == 0 and width % 2 == 0,
        f"data {s.data.height} x {s.data.width} gives latents of {height} x {width}, but 2 x 2 patches need even sides",
    )
    if check_backend:
        try:
            forward_mode = OBJECTIVES[s.objective].forward_mode
            wanted = "xla" if forward_mode and m.attention == "auto" else m.attention
            backend = choose_backend(wanted, platform, cfg.compute_dtype, cfg.head_size)
        except ValueError as error:
            raise ConfigError(f"model.{error}") from None
        _require(
            backend == "xla" or not forward_mode,
            f"model.attention is {backend!r}, which has no forward-mode derivative, as objective={s.objective} needs: "
            f"set model.attention=xla",
        )
        cfg = dataclasses.replace(cfg, attention=backend)
    return cfg


def mesh_shape(s: Settings, num_devices: int) -> MeshShape:
    """The mesh on `num_devices` devices, with -1 resolved.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    axes = {name: getattr(s.mesh, name) for name in MESH_AXES}
    text = " x ".join(f"{name} {size}" for name, size in axes.items())
    free = [name for name, size in axes.items() if size == -1]
    _require(len(free) <= 1, f"mesh {text}: only one axis may be -1")
    _require(all(size >= 1 or size == -1 for size in axes.values()), f"mesh {text}: sizes are at least 1, or -1")
    fixed = math.prod(size for size in axes.values() if size != -1)
    if free and num_devices % fixed == 0:
        axes[free[0]] = num_devices // fixed
    shape = MeshShape(**axes) if min(axes.values()) > 0 else None
    _require(
        shape is not None and shape.devices == num_devices,
        f"mesh {text} needs {'a multiple of ' if free else ''}{fixed} devices, but there are {num_devices}: "
        f"set --config.mesh.data, .fsdp and .tensor so that they multiply to {num_devices}",
    )
    return typing.cast(MeshShape, shape)


def check_tensor(cfg: FluxConfig, shape: MeshShape) -> None:
    """Raises ConfigError where the tensor axis does not divide the heads."""
    _require(
        cfg.heads % shape.tensor == 0,
        f"mesh.tensor is {shape.tensor}, but it splits the model's {cfg.heads} heads: choose a divisor of {cfg.heads}",
    )


def global_batch(s: Settings, shape: MeshShape) -> int:
    """Rows of a step on a mesh.

    Raises:
      ConfigError: the rows of a shard are not a multiple of micro-batches x group size.
    """
    group = row_group(objective_settings(s)).size
    batch = s.batch_size if s.batch_size is not None else (s.batch_per_device or 0) * shape.batch_shards
    unit = shape.batch_shards * s.accumulate * group
    _require(
        batch > 0 and batch % unit == 0,
        f"a global batch of {batch} rows cannot be divided: it must be a positive multiple of {unit} = "
        f"{shape.batch_shards} shards (data x fsdp) x {s.accumulate} micro-batches x groups of {group} rows; "
        f"the nearest above is {max(-(-batch // unit), 1) * unit}",
    )
    return batch


def sampling_start(s: Settings) -> float:
    """The time at which many sampling steps begin: 1 where no row is asked a step, or the network is told its size."""
    row = OBJECTIVES[s.objective]
    return s.multistep_start if row.distils and s.rows.distilled and not row.needs_step_size else 1.0


def objective_settings(s: Settings) -> ObjectiveSettings:
    """The objective's part of the settings."""
    low, high = s.guidance or EMBEDDED_GUIDANCE
    weights = s.student_weights if s.one_step_share is None else weights_for_share(s.student_steps, s.one_step_share)
    student = StudentSteps(s.student_steps, weights, s.jumps, sampling_start(s))
    # Flow rows alone train all times: sampling begins at the greatest.
    times = (s.timestep_range[0], s.timestep_range[1]) if OBJECTIVES[s.objective].distils else (0.0, 1.0)
    return ObjectiveSettings(
        s.objective,
        s.rows,
        student,
        s.shift,
        s.timestep,
        (low, high),
        times,
        s.guide,
        s.teacher_share,
        s.teacher_grid,
        s.rolled_steps,
        s.alpha,
    )


def step_settings(s: Settings, model: FluxConfig) -> StepSettings:
    """The train step's part of the settings, with the network already resolved."""
    return StepSettings(model, objective_settings(s), s.optimizer, s.ema, s.steps, s.seed, s.accumulate, s.spikes)
