"""diffusers' `scheduler_config.json`: what of it our sampler computes too, and what it would compute otherwise.

Its sigmas are our times: 1 is noise.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from shortcut_jax.core.schedules import ShiftRule, Spacing
from shortcut_jax.errors import ConversionError
from shortcut_jax.weights.entries import FLAG, NUMBER, WHOLE, told

CLASS = "FlowMatchEulerDiscreteScheduler"

DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "time_shift_type": "exponential",
    "stochastic_sampling": False,
}
"""Every argument of the class, and its default."""

UNSUPPORTED = {
    "num_train_timesteps": "the network would be conditioned on other times",
    "invert_sigmas": "data and noise change places",
    "use_beta_sigmas": "the times follow a beta distribution",
    "stochastic_sampling": "fresh noise is added at each step",
}
"""Arguments that have to be at their defaults, and what they would do otherwise."""

_READ_BY_DIFFUSERS = {
    "use_flow_sigmas": "the times would not begin at 1",
    "sigma_min": "the times would end elsewhere",
    "sigma_max": "the times would begin elsewhere",
}
"""No arguments of the class, but read where a file has them."""

_REMEDY = "remove the folder scheduler to sample as FLUX.1 is"


class Schedule(NamedTuple):
    """What a scheduler computes.

    Attributes:
      shift: of its times.
      spacing: of its times.
      notes: what the reader should know.
    """

    shift: ShiftRule
    spacing: Spacing
    notes: tuple[str, ...]


def check_class(name: Any, config: Mapping[str, Any], where: str) -> None:
    """Refuses a scheduler of another class, for it would give other images.

    Args:
      name: of the class; None where the file does not say.
      config: of the scheduler.
      where: what names the class.

    Raises:
      ConversionError: the message says what to write in its place.
    """
    if name in (None, CLASS):
        return
    flow = config.get("use_flow_sigmas") and isinstance(config.get("flow_shift"), int | float)
    also = f', or write {{"_class_name": "{CLASS}", "shift": {config["flow_shift"]}}} into it' if flow else ""
    raise ConversionError(f"{where} names the scheduler {name}, but only {CLASS} is supported: {_REMEDY}{also}")


def read(config: Mapping[str, Any], where: str) -> Schedule:
    """The times of a scheduler.

    Raises:
      ConversionError: an entry of another kind, or one that our sampler does not compute; the message names `where`.
    """
    given = {k: v for k, v in config.items() if v is not None and not k.startswith("_")}
    for name, reason in UNSUPPORTED.items():
        kind = FLAG if isinstance(DEFAULTS[name], bool) else WHOLE
        if told(given, name, kind, DEFAULTS[name], where) != DEFAULTS[name]:
            raise ConversionError(f"{where} says {name} {given[name]}, which is not supported ({reason}): {_REMEDY}")
    for name, reason in _READ_BY_DIFFUSERS.items():
        if given.get(name):
            raise ConversionError(f"{where} says {name} {given[name]}, which is not supported ({reason}): {_REMEDY}")
    entry = lambda name, kind: told(given, name, kind, DEFAULTS[name], where)
    kinds = [name for name in ("karras", "exponential") if entry(f"use_{name}_sigmas", FLAG)]
    if len(kinds) > 1:
        raise ConversionError(f"{where} says both use_karras_sigmas and use_exponential_sigmas: choose one")
    if (form := given.get("time_shift_type", "exponential")) not in ("exponential", "linear"):
        raise ConversionError(f"{where} says time_shift_type {form!r}, but it must be exponential or linear")
    dynamic = entry("use_dynamic_shifting", FLAG)
    few, many = (entry(name, WHOLE) for name in ("base_image_seq_len", "max_image_seq_len"))
    if dynamic and few == many:
        raise ConversionError(f"{where} says base_image_seq_len and max_image_seq_len {few}, but they must differ")
    fixed, base, most = (entry(name, NUMBER) for name in ("shift", "base_shift", "max_shift"))
    terminal = told(given, "shift_terminal", NUMBER, 0.0, where)
    unknown = sorted(given.keys() - DEFAULTS.keys() - _READ_BY_DIFFUSERS.keys())
    notes = [f"{where}: {', '.join(unknown)} has no meaning for {CLASS} and is left out"] if unknown else []
    try:
        shift = ShiftRule(dynamic, fixed, base, most, few, many, form == "linear")
        return Schedule(shift, Spacing(kinds[0] if kinds else "uniform", terminal), tuple(notes))
    except ValueError as error:
        raise ConversionError(f"{where}: {error}") from error


def write(shift: ShiftRule, spacing: Spacing) -> dict[str, Any]:
    """The `scheduler_config.json` of a schedule; what is at its default and newer than Flux is left out."""
    newer = {
        "time_shift_type": "linear" if shift.linear else None,
        "shift_terminal": spacing.terminal or None,
        "use_karras_sigmas": spacing.kind == "karras" or None,
        "use_exponential_sigmas": spacing.kind == "exponential" or None,
    }
    return {
        "_class_name": CLASS,
        "num_train_timesteps": DEFAULTS["num_train_timesteps"],
        "shift": shift.shift,
        "use_dynamic_shifting": shift.dynamic,
        "base_shift": shift.base_shift,
        "max_shift": shift.max_shift,
        "base_image_seq_len": shift.base_tokens,
        "max_image_seq_len": shift.max_tokens,
        **{name: value for name, value in newer.items() if value is not None},
    }
