"""Training from given weights: `--config.init_from=PATH`."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from shortcut_jax.assemble import Assembly, init_params
from shortcut_jax.core.tree import flat_paths
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.runtime.distributed import say
from shortcut_jax.settings import ConfigError
from shortcut_jax.sources import Model, holds_lora, open_models, place
from shortcut_jax.weights.rules import nest

GEOMETRY = (
    *("double_blocks", "single_blocks", "width", "heads", "axes", "channels", "text_width", "pooled_width"),
    *("guidance", "mlp_ratio", "theta"),
)
"""What has to be the same in a checkpoint and in the network that starts from it."""

STEP_INPUT = "step_in/"
"""Parameters that a shortcut model has and Flux has not; their output starts at zero."""


def open_initial(assembly: Assembly) -> Model:
    """The transformer that a run starts from, its headers read and its geometry compared.

    Raises:
      ConfigError: it is not there, holds no transformer, or is of another geometry.
      SafetensorsError, ConversionError, ConvertedError: it cannot be read.
    """
    s = assembly.settings
    path = Path(str(s.init_from)).expanduser()
    if not path.exists():
        raise ConfigError(f"init_from={s.init_from} is not there")
    if holds_lora(path):
        raise ConfigError(
            f"init_from={s.init_from} is a LoRA, but all weights are trained: merge it into its base first with "
            f"python -m shortcut_jax.convert --from=BASE --lora={s.init_from} --to=MERGED"
        )
    models = [m for m in open_models(path, s.init_view) if m.kind == "flux"]
    if not models:
        raise ConfigError(f"init_from={s.init_from} holds no Flux transformer")
    (model,) = models
    differences = _differences(model.config, assembly.model)
    if differences:
        raise ConfigError(
            f"init_from={s.init_from} is another network than model.preset={s.model.preset}; checkpoint -> config: "
            f"{'; '.join(differences)}"
        )
    if model.config.step_size and not assembly.model.step_size:
        raise ConfigError(f"init_from={s.init_from} has a step-size embedding: train it with objective=shortcut")
    return model


def _differences(stored: FluxConfig, wanted: FluxConfig) -> list[str]:
    old, new = dataclasses.asdict(stored), dataclasses.asdict(wanted)
    return [f"{name}: {old[name]!r} -> {new[name]!r}" for name in GEOMETRY if old[name] != new[name]]


def load_initial(assembly: Assembly, model: Model) -> Any:
    """The weights on the mesh, in the dtype and shardings of the run; no host holds the whole model."""
    say(f"starting from {model.origin}")
    for note in model.notes:
        say(f"note: {note}")
    wanted = flat_paths(assembly.state_shapes.params)
    fresh = {path for path in wanted if path not in model.params and path.startswith(STEP_INPUT)}
    placed = place(model.params, nest({k: v for k, v in wanted.items() if k not in fresh}))
    if not fresh:
        return placed
    say("the step-size embedding starts from scratch")
    shardings = nest({k: wanted[k].sharding for k in fresh})
    name = STEP_INPUT.rstrip("/")
    make = lambda key: {name: init_params(assembly.model, key)[name]}
    return placed | jax.jit(make, out_shardings=shardings)(jax.random.key(assembly.settings.seed))
