"""What can be computed but not trained: refused before anything is compiled, with the reason."""

import re
from collections.abc import Sequence
from typing import Any

from shortcut_jax.config.schema import Settings
from shortcut_jax.core.tree import flat_paths
from shortcut_jax.errors import ConfigError
from shortcut_jax.run.assembly import Assembly
from shortcut_jax.runtime.device_table import require_float8
from shortcut_jax.runtime.sharding import own_device
from shortcut_jax.steps.optim import OptimizerSettings


def check_training(s: Settings) -> None:
    """Raises ConfigError for dtypes in which training fails quietly, and for EMAs that are no fast and slow one.

    A run that was trained so can still be read.
    """
    if s.train == "all" and s.model.param_dtype != "float32":
        raise ConfigError(
            f"model.param_dtype={s.model.param_dtype} with train=all loses updates that are too small for it (in "
            f"bfloat16, 30% of the weights never move at a learning rate of 2e-4, and 95% at 1e-5), and Adam's moments "
            f"would have that dtype too: set model.param_dtype=float32; model.compute_dtype=bfloat16 saves the time"
        )
    for name, dtype in (("model.compute_dtype", s.model.compute_dtype), ("grad_reduce_dtype", s.grad_reduce_dtype)):
        if dtype == "float16":
            raise ConfigError(
                f"{name}=float16 needs loss scaling, which training does not have: gradients would become zero or "
                f"infinite; set {name}=bfloat16, which has the range of float32"
            )
    if s.ema.slow <= s.ema.fast:
        raise ConfigError(
            f"ema.slow={s.ema.slow} must be greater than ema.fast={s.ema.fast}: the decay of the slow EMA is the "
            f"one closer to 1 (the defaults are 0.999 and 0.99)"
        )


def check_paths(assembly: Assembly) -> None:
    """Raises ConfigError where a pattern of parameters that the user chose matches none (see `decay_notice` else)."""
    optimizer = assembly.settings.optimizer
    paths = list(flat_paths(assembly.state_shapes.params))
    if optimizer.decay_paths != OptimizerSettings.decay_paths and not _matches(optimizer.decay_paths, paths):
        raise ConfigError(
            f"optimizer.decay_paths={optimizer.decay_paths!r} matches no parameter: it has to match a whole path, such "
            f"as {paths[0]} or {paths[-1]}"
        )


def assemble_training(settings: Settings, devices: Sequence[Any] | None = None) -> Assembly:
    """What trains a config, checked.

    Raises:
      ConfigError: the config cannot be trained, or not on these devices.
    """
    check_training(settings)
    assembly = Assembly(settings, devices)
    require_float8(own_device(assembly.mesh), "model.matmul_dtype", settings.model.matmul_dtype)
    check_paths(assembly)
    return assembly


def decay_notice(assembly: Assembly) -> list[str]:
    """A line where weight decay is on and, by the default pattern, applies to nothing."""
    optimizer = assembly.settings.optimizer
    paths = flat_paths(assembly.state_shapes.params)
    if not optimizer.weight_decay or _matches(optimizer.decay_paths, list(paths)):
        return []
    return [
        f"optimizer.weight_decay={optimizer.weight_decay:g} applies to no parameter: optimizer.decay_paths="
        f"{optimizer.decay_paths!r} matches none of {next(iter(paths))}, ... (adapters are '.*/[ab]')"
    ]


def _matches(pattern: str, paths: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, path) for path in paths)
