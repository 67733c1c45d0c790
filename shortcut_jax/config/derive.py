"""What settings mean on devices: the network, the mesh, the global batch, what a step is conditioned on."""

import dataclasses
import math
import typing

from shortcut_jax.config.schema import Settings
from shortcut_jax.core.schedules import Spacing, StudentSteps, weights_for_share
from shortcut_jax.data.records import latent_size
from shortcut_jax.errors import ConfigError, require
from shortcut_jax.models.attention import choose_backend
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.models.presets import preset
from shortcut_jax.runtime.sharding import MESH_AXES, MeshShape
from shortcut_jax.steps.objectives import OBJECTIVES, ObjectiveSettings, row_group
from shortcut_jax.steps.train_step import StepSettings

EMBEDDED_GUIDANCE = (0.0, 7.5)
"""The range that models with a guidance embedding are conditioned on by default, as published for FLUX.1 dev."""


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
        matmul_dtype=m.matmul_dtype,
        param_dtype=m.param_dtype,
        grad_reduce_dtype=s.grad_reduce_dtype,
        remat="full" if m.remat == "auto" else m.remat,  # until one is chosen (run/step_memory.py)
        scan_unroll=m.scan_unroll,
    )
    require(
        cfg.width > 0 and cfg.heads > 0 and cfg.width % cfg.heads == 0,
        f"model width {cfg.width} is not a multiple of its {cfg.heads} heads",
    )
    require(
        len(cfg.axes) == 3 and sum(cfg.axes) == cfg.head_size and all(a % 2 == 0 and a > 0 for a in cfg.axes),
        f"head size {cfg.head_size} (width {cfg.width} / heads {cfg.heads}) does not match the RoPE axes {cfg.axes}: "
        f"three even numbers that sum to the head size",
    )
    require(cfg.double_blocks >= 0 and cfg.single_blocks >= 0, "model.double_blocks and single_blocks are counts")
    height, width = latent_size(s.data)
    require(
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
        require(
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
    require(len(free) <= 1, f"mesh {text}: only one axis may be -1")
    require(all(size >= 1 or size == -1 for size in axes.values()), f"mesh {text}: sizes are at least 1, or -1")
    fixed = math.prod(size for size in axes.values() if size != -1)
    if free and num_devices % fixed == 0:
        axes[free[0]] = num_devices // fixed
    shape = MeshShape(**axes) if min(axes.values()) > 0 else None
    require(
        shape is not None and shape.devices == num_devices,
        f"mesh {text} needs {'a multiple of ' if free else ''}{fixed} devices, but there are {num_devices}: "
        f"set --config.mesh.data, .fsdp and .tensor so that they multiply to {num_devices}",
    )
    return typing.cast(MeshShape, shape)


def check_tensor(cfg: FluxConfig, shape: MeshShape) -> None:
    """Raises ConfigError where the tensor axis does not divide the heads."""
    require(
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
    require(
        batch > 0 and batch % unit == 0,
        f"a global batch of {batch} rows cannot be divided: it must be a positive multiple of {unit} = "
        f"{shape.batch_shards} shards (data x fsdp) x {s.accumulate} micro-batches x groups of {group} rows; "
        f"the nearest above is {max(-(-batch // unit), 1) * unit}",
    )
    return batch


def sampling_spacing(s: Settings) -> Spacing:
    """The times of a run's samplers: from 1 without self rows, or where the network has a step-size input."""
    row = OBJECTIVES[s.objective]
    if not row.distils or not s.rows.distilled or row.needs_step_size or s.multistep_start == 1:
        return Spacing()
    return Spacing(start=s.multistep_start, scaled=s.multistep_times == "all")


def objective_settings(s: Settings) -> ObjectiveSettings:
    """The objective's part of the settings."""
    low, high = s.guidance or EMBEDDED_GUIDANCE
    weights = s.student_weights if s.one_step_share is None else weights_for_share(s.student_steps, s.one_step_share)
    spacing = sampling_spacing(s)
    student = StudentSteps(s.student_steps, weights, s.jumps, spacing.start, spacing.scaled)
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
        s.guidance_mode,
        s.teacher_share,
        s.teacher_grid,
        s.rolled_steps,
        s.alpha,
        s.adaptive_power,
    )


def step_settings(s: Settings, model: FluxConfig) -> StepSettings:
    """The train step's part of the settings, with the network already resolved."""
    return StepSettings(model, objective_settings(s), s.optimizer, s.ema, s.steps, s.seed, s.accumulate, s.spikes)
