"""Configs as runs have stored them: fields that are newer than a run, and names of former versions."""

from typing import Any

from shortcut_jax.config.schema import Settings, build, to_dict
from shortcut_jax.errors import ConfigError
from shortcut_jax.models.presets import preset

FORMER_MODES = {"told": "embedded", "both": "cfg", "teacher": "distill", "targets": "cfg_targets"}
"""Value of `guide`, as `guidance_mode` was called until 2026-11-27 -> its value now."""


def complete(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored config with the defaults of fields that are newer than it: a default means what was done before.

    Raises:
      ConfigError: a value stands where there have to be several.
    """
    _check_tables(stored, to_dict(Settings()), "")
    if "ema" in stored:  # a rule of former versions that restarted the EMAs by itself
        kept = {k: v for k, v in stored["ema"].items() if k not in ("restart_auto", "restart_ratio")}
        stored = {**stored, "ema": kept}
    stored = renamed(stored)
    # Older than post-training: no rows had a teacher, and all configs had a guidance range.
    if "guidance_mode" not in stored:
        if missing := [name for name in ("rows", "model") if name not in stored]:
            raise ConfigError(f"config key {missing[0]!r} is missing in what is stored")
        stored = {**stored, "rows": {k: v for k, v in stored["rows"].items() if k != "teacher_rows"}}
        if not preset(str(stored["model"].get("preset"))).guidance:
            stored["guidance"] = ()
    return _complete(stored, to_dict(Settings()))


def renamed(config: dict[str, Any]) -> dict[str, Any]:
    """A config without the names that fields and values had in former versions."""
    if "guide" not in config:
        return config
    if "guidance_mode" in config:
        raise ConfigError("guide is the former name of guidance_mode: give guidance_mode alone")
    mode = FORMER_MODES.get(str(config["guide"]), config["guide"])
    return {"guidance_mode": mode} | {name: value for name, value in config.items() if name != "guide"}


def read_stored(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored config as `to_dict` gives one now, of all fields."""
    return to_dict(build(complete(stored)))


def _check_tables(stored: Any, defaults: dict[str, Any], name: str) -> None:
    if not isinstance(stored, dict):
        raise ConfigError(f"{name or 'the config'} is {str(stored)[:40]!r}, but must hold {', '.join(defaults)}")
    for key, value in defaults.items():
        if isinstance(value, dict) and key in stored:
            _check_tables(stored[key], value, f"{name}.{key}".strip("."))


def _complete(stored: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    added = {
        key: _complete(stored.get(key, {}), value) if isinstance(value, dict) else stored.get(key, value)
        for key, value in defaults.items()
    }
    return {**stored, **added}
