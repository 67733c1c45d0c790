"""The schema of a run: a ConfigDict becomes frozen dataclasses, or one clear line.

Nothing below the mains ever sees a ConfigDict. Every key has a default here, and a key that is not here is an error.
Ranges and divisibility are checked in `config/checks.py`.
"""

import dataclasses
import functools
import math
import typing
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict, config_dict

from shortcut_jax.cluster.watchdog import WatchdogSettings
from shortcut_jax.config.fields import FieldError, describe, field_types, parse_text, split_hint, unknown
from shortcut_jax.core.batch_split import RowGroup
from shortcut_jax.core.ema import EmaSettings
from shortcut_jax.core.local_path import local_path
from shortcut_jax.core.loss_spikes import SpikeSettings
from shortcut_jax.core.schedules import AlphaSchedule, ShiftRange, StudentSteps
from shortcut_jax.core.setting import AT_LEAST_ONE, FREE, NOT_NEGATIVE, POSITIVE, PROBABILITY, SCHEDULE, setting
from shortcut_jax.data.records import DataSettings
from shortcut_jax.errors import ConfigError
from shortcut_jax.steps.optim import OptimizerSettings


@dataclass(frozen=True)
class ModelSettings:
    """The network: a preset and how to compute it. A geometry field of None is the preset's.

    Attributes:
      preset: a row of `models/presets.py`.
      double_blocks: overrides the preset, as do the next five.
      single_blocks: see `FluxConfig`.
      width: see `FluxConfig`.
      heads: see `FluxConfig`.
      axes: see `FluxConfig`.
      guidance: whether there is a guidance embedding; see `FluxConfig`.
      compute_dtype: dtype of activations and matrix products.
      matmul_dtype: float8 for the operands of the blocks' matrix products, twice as fast on GPUs that have it (NVIDIA's
        H100 and later, L4, L40S); None for the compute dtype (see `docs/performance.md`).
      param_dtype: dtype of the weights.
      remat: rematerialisation policy: none, full, branch, branch_mlp, selective, dots, or auto: the fastest that fits
        the memory of a device (see `docs/performance.md`).
      attention: auto, xla, cudnn or pallas.
      scan_unroll: blocks an iteration of the compiled loop holds.
    """

    preset: str = "digits"
    double_blocks: int | None = None
    single_blocks: int | None = None
    width: int | None = None
    heads: int | None = None
    axes: tuple[int, ...] | None = None
    guidance: bool | None = None
    compute_dtype: str = "float32"
    matmul_dtype: str | None = None
    param_dtype: str = "float32"
    remat: str = setting("none", resume=FREE)
    attention: str = setting("auto", resume=FREE)
    scan_unroll: int = setting(1, AT_LEAST_ONE, resume=FREE)


@dataclass(frozen=True)
class LoraSettings:
    """Adapters, where `train` is lora.

    Attributes:
      rank: r.
      alpha: the product of the factors is multiplied by alpha / r.
      rslora: by alpha / sqrt(r) instead (rank-stabilised LoRA).
      paths: regular expression over the whole path of a layer; all linear layers by default.
    """

    rank: int = setting(64, AT_LEAST_ONE)
    alpha: float = setting(64.0, POSITIVE)
    rslora: bool = False
    paths: str = ".*"

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class MeshSettings:
    """Devices along each mesh axis; one of them may be -1, which means all devices that remain.

    Attributes:
      data: copies of the weights, across nodes where there are several (hybrid sharding with fsdp inside each).
      fsdp: shards of weights, moments and EMAs.
      tensor: shards of heads and MLP width.
      min_shard: layers with fewer values are not split over fsdp.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    min_shard: int = setting(2**16, NOT_NEGATIVE)


@dataclass(frozen=True)
class EvalSettings:
    """Sample grids during training and the report at the end.

    Attributes:
      steps: sampling step counts, a row of the grid and a column of the report each.
      views: weights that the report judges; `teacher` too, where there is one.
      images: images a view is judged on, in the order of `views`; 0 means as many as the data set has.
      seeds: noise seeds of the report; the table gives mean and spread.
      captions: captions of the sample grid; empty means those of the first records of the data set.
      columns: columns of the sample grid.
      view: the view that the sample grid shows.
      shift: timestep shift of the sampling grid.
      guidance: guidance scale; 1 means none.
      batch_size: images sampled at once.
    """

    steps: tuple[int, ...] = (1, 2, 3, 4, 8, 32)
    views: tuple[str, ...] = ("online", "fast", "slow")
    images: tuple[int, ...] = (512, 512, 0)
    seeds: tuple[int, ...] = (0,)
    captions: tuple[str, ...] = ()
    columns: int = setting(10, AT_LEAST_ONE)
    view: str = "slow"
    shift: float = setting(1.0, POSITIVE)
    guidance: float = 1.0
    batch_size: int = setting(256, AT_LEAST_ONE)


@dataclass(frozen=True)
class ValidationSettings:
    """The loss on held-out images: plain flow matching at fixed times with fixed noise.

    Attributes:
      every: steps between validations, the last step included; 0 means never.
      every_samples: the same in samples (MLPerf's benchmark: 262,144); give this or `every`.
      name: the set; that of the training data by default.
      split: split of that set.
      rule: which times, a key of `steps.validation_loss.RULES`: mlperf or midpoints.
      images: records that are used, from the beginning of the split; 0 means all.
      views: weights that are validated.
      seed: of the noise.
    """

    every: int = setting(0, NOT_NEGATIVE)
    every_samples: int = setting(0, NOT_NEGATIVE)
    name: str | None = None
    split: str = "validation"
    rule: str = "mlperf"
    images: int = setting(0, NOT_NEGATIVE)
    views: tuple[str, ...] = ("slow",)
    seed: int = setting(0, NOT_NEGATIVE)

    def interval(self, batch_size: int) -> int:
        """Steps of `batch_size` samples between validations; 0 means never."""
        return self.every or -(-self.every_samples // batch_size)


@dataclass(frozen=True)
class Settings:
    """A whole run. The config file sets what differs from these defaults.

    Attributes:
      objective: scfm, flow, shortcut, alpha or meanflow.
      steps: training steps.
      seed: seed of initial weights, data order and every random draw.
      train: all, or lora: adapters on a frozen base, which stays bfloat16.
      lora: the adapters.
      init_from: checkpoint to start from instead of random weights: whatever `sources.open_models` reads. With lora it
        is the base, or adapters (a workdir of ours, a PEFT or kohya file) that training continues from.
      init_view: weights of it, where it is a training workdir: online, fast or slow.
      base: the frozen base and teacher, where it is not `init_from` or has moved; its content is what counts.
      teacher_lora: adapters that make the base the teacher (it was fine-tuned); lora starts from a copy of them.
      teacher_share: probability that a self row learns from the teacher instead of from the model itself.
      teacher_grid: steps of the teacher's grid.
      batch_size: global batch, rows a step; give this or `batch_per_device`.
      batch_per_device: rows a step for each device along the mesh axes data and fsdp.
      accumulate: micro-batches a step.
      rows: rows of each kind in each group of consecutive rows (all objectives but flow).
      rolled_steps: steps of the slow EMA from noise to where a rolled row begins.
      student_steps: student step counts that self rows train (scfm, shortcut).
      student_weights: how often each of them is drawn; empty means equally often.
      one_step_share: instead of the weights, the share of one step among self rows that begin at pure noise.
      multistep_start: the time near 1 at which samplers of many steps begin, in training and afterwards; those of few
        begin later, one step at 1, so that each has a first step of its own (scfm). 1 for all alike.
      multistep_times: which times of a sampler `multistep_start` moves: first, or all, each scaled by the sampler's
        start, so that different step counts never share a time.
      jumps: grid steps of a student step, an even number.
      alpha: the curriculum of objective=alpha.
      adaptive_power: p of the weight of a row in the loss, (|error|^2 + 0.001)^-p: 0 weighs all alike, 1 is what the
        authors of MeanFlow and alpha-Flow take. The loss that is reported is unweighted.
      shift: timestep shift of self rows.
      timestep: how flow rows draw t, and alpha and meanflow the ends of an interval: uniform or logit_normal.
      timestep_range: the least and the greatest t that flow rows draw beside self rows (all objectives but flow).
      guidance: range (low, high) of the guidance scale in training; empty means none, or FLUX.1's (0, 7.5) for models
        with a guidance embedding.
      guidance_mode: where it enters: embedded, cfg, distill or cfg_targets (see `steps.networks.GUIDANCE_MODES`).
      max_skipped: skipped steps (not finite, or spikes) in a row that are tolerated; one more stops the run.
      grad_reduce_dtype: dtype in which weight gradients are added up between devices.
      log_every: steps between lines of metrics.
      sample_every: steps between sample grids; 0 means at the end only.
      checkpoint_every: steps between checkpoints; 0 means at the end only.
      keep: newest checkpoints kept.
      heartbeat_every: seconds between heartbeats; see `cluster/heartbeat.py`.
      profile_steps: steps that are profiled, as FIRST:END without END: 10:13 is 10, 11 and 12. Empty means none. The
        profile is written to `profile` in the workdir.
      save_attempts: how often a checkpoint is tried, with growing pauses, where the storage fails.
      peer_timeout: seconds without a sign of life after which a process is lost, and all others end.
    """

    objective: str = "scfm"
    steps: int = setting(1000, AT_LEAST_ONE, resume=SCHEDULE)
    seed: int = setting(0, NOT_NEGATIVE)
    train: str = "all"
    lora: LoraSettings = setting(LoraSettings)
    init_from: str | None = None
    init_view: str = "slow"
    base: str | None = setting(None, resume=FREE)
    teacher_lora: str | None = setting(None, resume=FREE)
    teacher_share: float = setting(0.0, PROBABILITY)
    teacher_grid: int = 32
    batch_size: int | None = None
    batch_per_device: int | None = setting(None, resume=FREE)
    accumulate: int = setting(1, AT_LEAST_ONE, resume=FREE)
    rows: RowGroup = setting(RowGroup)
    rolled_steps: int = setting(4, AT_LEAST_ONE)
    student_steps: tuple[int, ...] = StudentSteps.counts
    student_weights: tuple[float, ...] = ()
    one_step_share: float | None = None
    multistep_start: float = 1.0
    multistep_times: str = "first"
    jumps: int = 2
    alpha: AlphaSchedule = setting(AlphaSchedule)
    adaptive_power: float = setting(0.0, NOT_NEGATIVE)
    shift: ShiftRange = setting(ShiftRange)
    timestep: str = "uniform"
    timestep_range: tuple[float, ...] = (0.0, 1.0)
    guidance: tuple[float, ...] = ()
    guidance_mode: str = "embedded"
    max_skipped: int = setting(0, NOT_NEGATIVE, resume=SCHEDULE)
    grad_reduce_dtype: str = "float32"
    log_every: int = setting(10, AT_LEAST_ONE, resume=FREE)
    sample_every: int = setting(0, NOT_NEGATIVE, resume=FREE)
    checkpoint_every: int = setting(0, NOT_NEGATIVE, resume=FREE)
    keep: int = setting(3, AT_LEAST_ONE, resume=FREE)
    heartbeat_every: float = setting(5.0, POSITIVE, resume=FREE)
    profile_steps: str = setting("", resume=FREE)
    save_attempts: int = setting(3, AT_LEAST_ONE, resume=FREE)
    peer_timeout: float = setting(60.0, resume=FREE)
    model: ModelSettings = setting(ModelSettings)
    mesh: MeshSettings = setting(MeshSettings, resume=FREE)
    data: DataSettings = setting(DataSettings)
    optimizer: OptimizerSettings = setting(OptimizerSettings)
    ema: EmaSettings = setting(EmaSettings)
    spikes: SpikeSettings = setting(SpikeSettings, resume=SCHEDULE)
    watchdog: WatchdogSettings = setting(WatchdogSettings, resume=FREE)
    eval: EvalSettings = setting(EvalSettings, resume=FREE)
    validation: ValidationSettings = setting(ValidationSettings, resume=FREE)

    @property
    def has_base(self) -> bool:
        """Whether a run has frozen weights: a base, a teacher, or both in one."""
        return self.train == "lora" or self.teacher_share > 0


PATHS = ("init_from", "base", "teacher_lora")
"""The fields of `Settings` that are paths; `data.dir` is one too."""


def default_config() -> ConfigDict:
    """A locked ConfigDict of every key with its default: where each config file starts."""
    return _to_config(Settings()).lock()


def _to_config(settings: Any) -> ConfigDict:
    config = ConfigDict()
    for name, hint in typing.get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if dataclasses.is_dataclass(value):
            value = _to_config(value)
        elif value is None:
            kind, _ = split_hint(hint)
            value = config_dict.placeholder(typing.get_origin(kind) or kind)
        config[name] = value
    return config


def build(config: Any) -> Settings:
    """Freezes a ConfigDict or plain nested dicts, by names and types alone (`resolve.from_config` checks values too).

    Raises:
      ConfigError: an unknown, missing or wrongly typed key.
    """
    return _build(Settings, config, "")


def _build(cls: type, config: Any, prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    if not hasattr(config, "items"):
        raise ConfigError(f"{prefix.rstrip('.') or 'the config'} is {config!r}, but must be a group of config keys")
    given = dict(config.items())
    for key in given:
        if key not in hints:
            raise ConfigError(unknown_key(f"{prefix}{key}"))
    for key in hints:
        if key not in given:
            raise ConfigError(f"config key {prefix + key!r} is missing: start from config.default_config()")
    values = {}
    for key, hint in hints.items():
        nested = dataclasses.is_dataclass(hint)
        values[key] = _build(hint, given[key], f"{prefix}{key}.") if nested else _cast(given[key], hint, prefix + key)
    return cls(**values)


def _cast(value: Any, hint: Any, name: str) -> Any:
    kind, optional = split_hint(hint)
    if value is None and optional:
        return None
    if typing.get_origin(kind) is tuple and isinstance(value, tuple | list):
        inner = typing.get_args(kind)[0]
        return tuple(_cast(v, inner, name) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**1023 else math.inf  # which no check lets pass
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{name} is {value!r}, but must be {describe(hint)}")


@functools.cache
def known_fields() -> dict[str, Any]:
    """The type hint of every config key, by its dotted name."""
    return field_types(Settings)


def unknown_key(name: str) -> str:
    """What to say of a name that is no config key."""
    if name == "guide":
        return "guide is called guidance_mode now, with the values embedded, cfg, distill and cfg_targets"
    return unknown(name, tuple(known_fields()))


def parse_field(name: str, text: str) -> Any:
    """The value that a text on a command line means for a config key.

    Raises:
      ConfigError: there is no such key, or it is not of that type.
    """
    if name not in known_fields():
        raise ConfigError(unknown_key(name))
    try:
        return parse_text(text, known_fields()[name])
    except FieldError as error:
        raise ConfigError(f"{name} {error}") from None


def to_dict(settings: Any) -> dict[str, Any]:
    """Settings as nested plain dicts for JSON; `from_config` reads them back."""
    return dataclasses.asdict(settings)


def check_paths(settings: Settings) -> None:
    """Raises PathError where a field is not a path of this machine.

    They stay as they were given, so that the same command is the same run in a project folder that has moved, or is
    mounted elsewhere on another host; they are made absolute where they are opened.
    """
    for name, path in (*((name, getattr(settings, name)) for name in PATHS), ("data.dir", settings.data.dir)):
        if path is not None:
            local_path(path, name)
