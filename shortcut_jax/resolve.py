"""Configs against devices: every range and divisibility check, its numbers in the message, before any compilation."""

import dataclasses
import math
import re
import typing

from shortcut_jax.core.latents import PATCH
from shortcut_jax.core.schedules import StudentSteps
from shortcut_jax.data.records import latent_size
from shortcut_jax.models.attention import BACKENDS, choose_backend
from shortcut_jax.models.flux import REMAT_POLICIES, FluxConfig
from shortcut_jax.models.presets import PRESETS, preset
from shortcut_jax.runtime.sharding import MeshShape
from shortcut_jax.settings import ConfigError, EvalSettings, Settings, build, flatten, to_dict
from shortcut_jax.steps.objectives import OBJECTIVES, ObjectiveSettings, row_group
from shortcut_jax.steps.optim import SCHEDULES
from shortcut_jax.steps.train_step import StepSettings
from shortcut_jax.steps.views import VIEWS

DTYPES = ("float32", "bfloat16", "float16")

_AT_LEAST_ONE = (
    *("steps", "accumulate", "log_every", "keep", "data.text_tokens"),
    *("eval.batch_size", "eval.columns", "model.scan_unroll"),
)
_NOT_NEGATIVE = (
    *("seed", "max_skipped", "sample_every", "checkpoint_every"),
    *("rows.self_rows", "rows.flow_rows", "rows.teacher_rows"),
    *("ema.restart_every", "optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.clip_norm"),
)
_POSITIVE = ("optimizer.learning_rate", "optimizer.eps", "eval.shift")
_DECAYS = ("ema.fast", "ema.slow", "optimizer.b1", "optimizer.b2")
_PROBABILITIES = ("data.caption_dropout", "shift.dynamic")


def from_config(config: typing.Any) -> Settings:
    """Freezes and checks a ConfigDict (or plain nested dicts, as stored in a checkpoint).

    Raises:
      ConfigError: an unknown, missing or wrongly typed key, or a value out of range.
    """
    settings = build(config)
    _check(settings)
    return settings


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _one_of(name: str, value: str, choices: typing.Iterable[str]) -> None:
    _require(value in tuple(choices), f"{name} is {value!r}, but must be one of {', '.join(choices)}")


def _check(s: Settings) -> None:
    _one_of("objective", s.objective, OBJECTIVES)
    _one_of("timestep", s.timestep, ("uniform", "logit_normal"))
    _one_of("model.remat", s.model.remat, REMAT_POLICIES)
    _one_of("model.attention", s.model.attention, BACKENDS)
    _one_of("optimizer.schedule", s.optimizer.schedule, SCHEDULES)
    _one_of("data.store", s.data.store, ("pixels", "latents"))
    _one_of("data.text_encoder", s.data.text_encoder, ("words", "stored"))
    _one_of("eval.view", s.eval.view, VIEWS)
    _one_of("init_view", s.init_view, VIEWS)
    values = flatten(to_dict(s))
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
    _check_evaluation(s.eval)
    _require(
        s.data.store == "latents" or s.data.text_encoder == "words",
        "data.text_encoder is 'stored', but data.store 'pixels' has no stored text states: set data.text_encoder=words",
    )
    _require(
        len(s.guidance) == 2 and s.guidance[0] <= s.guidance[1],
        f"guidance is {s.guidance}, but must be (low, high) with low <= high",
    )
    try:
        re.compile(s.optimizer.decay_paths)
    except re.error as error:
        raise ConfigError(
            f"optimizer.decay_paths is {s.optimizer.decay_paths!r}, which is not a regular expression: {error}"
        ) from None
    _require(
        (s.batch_size is None) != (s.batch_per_device is None),
        f"give exactly one of batch_size and batch_per_device, not {s.batch_size} and {s.batch_per_device}",
    )
    model_config(s, "cpu", check_backend=False)


def _check_student(s: Settings) -> None:
    counts, weights = s.student_steps, s.student_weights
    _require(bool(counts) and min(counts) >= 1, f"student_steps is {counts}, but must be step counts of at least 1")
    _require(len(set(counts)) == len(counts), f"student_steps {counts} names a step count twice")
    _require(
        len(weights) in (0, len(counts)),
        f"student_weights has {len(weights)} entries for {len(counts)} step counts: give one each, or none",
    )
    _require(all(w >= 0 for w in weights) and (not weights or sum(weights) > 0), f"student_weights is {weights}")
    _require(
        s.jumps >= 2 and s.jumps % 2 == 0,
        f"jumps is {s.jumps}, but must be an even number of at least 2",
    )
    _require(0 < s.shift.low <= s.shift.high, f"shift is {s.shift.low} to {s.shift.high}: need 0 < low <= high")
    _require(
        s.rows.teacher_rows == 0,
        f"rows.teacher_rows is {s.rows.teacher_rows}, but a teacher comes only with post-training, which this version "
        f"does not have: set rows.teacher_rows=0",
    )
    _require(s.objective == "flow" or s.rows.size > 0, "rows.self_rows + rows.flow_rows is 0, but a group needs rows")


def _check_evaluation(e: EvalSettings) -> None:
    _require(bool(e.steps) and min(e.steps) >= 1, f"eval.steps is {e.steps}, but step counts must be at least 1")
    _require(bool(e.seeds), "eval.seeds is empty: name at least one noise seed")
    _require(min(e.seeds) >= 0, f"eval.seeds is {e.seeds}, but seeds must not be negative")
    for view in e.views:
        _one_of("eval.views", view, VIEWS)
    _require(len(e.images) == len(e.views), f"eval.images {e.images} and eval.views {e.views} must have one entry each")
    _require(all(n == 0 or n >= 2 for n in e.images), f"eval.images is {e.images}: a view needs 0 (all) or at least 2")


def model_config(s: Settings, platform: str, check_backend: bool = True) -> FluxConfig:
    """The network's config on a platform (see `choose_backend`), without a mesh.

    Raises:
      ConfigError: an unknown preset, a geometry that does not fit together, or an attention backend that cannot run.
    """
    m = s.model
    names = ("double_blocks", "single_blocks", "width", "heads", "axes")
    overrides = {n: getattr(m, n) for n in names if getattr(m, n) is not None}
    try:
        cfg = preset(m.preset)
    except ValueError as error:
        raise ConfigError(f"model.preset: {error}") from None
    cfg = dataclasses.replace(
        cfg,
        **overrides,
        step_size=s.objective == "shortcut",
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
            backend = choose_backend(m.attention, platform, cfg.compute_dtype, cfg.head_size)
        except ValueError as error:
            raise ConfigError(f"model.{error}") from None
        cfg = dataclasses.replace(cfg, attention=backend)
    return cfg


def mesh_shape(s: Settings, num_devices: int) -> MeshShape:
    """The mesh on `num_devices` devices, with -1 resolved.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    axes = dataclasses.asdict(s.mesh)
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


def check_images(s: Settings, cfg: FluxConfig, shapes: typing.Iterable[tuple[int, ...]]) -> None:
    """Raises ConfigError where images of pixels, each [h, w, c], are not what the config and its network take."""
    channels = cfg.channels // PATCH**2
    for height, width, depth in sorted(set(shapes)):
        _require(
            (height, width) == (s.data.height, s.data.width),
            f"the data set {s.data.name!r} holds images of {height} x {width} pixels, but data.height and data.width "
            f"are {s.data.height} and {s.data.width}: set --config.data.height={height} --config.data.width={width}",
        )
        fitting = [name for name, row in PRESETS.items() if row.channels == depth * PATCH**2]
        _require(
            depth == channels,
            f"the data set {s.data.name!r} holds images of {depth} channels, but the preset {s.model.preset!r} takes "
            f"{channels}: choose {' or '.join(fitting) or 'another data set; no preset takes these'}",
        )


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


def objective_settings(s: Settings) -> ObjectiveSettings:
    """The objective's part of the settings."""
    low, high = s.guidance
    student = StudentSteps(s.student_steps, s.student_weights, s.jumps)
    return ObjectiveSettings(s.objective, s.rows, student, s.shift, s.timestep, (low, high))


def step_settings(s: Settings, model: FluxConfig) -> StepSettings:
    """The train step's part of the settings, with the network already resolved."""
    return StepSettings(model, objective_settings(s), s.optimizer, s.ema, s.steps, s.seed, s.accumulate)
