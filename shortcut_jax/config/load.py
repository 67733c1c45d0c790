"""Config files: a Python file with `get_config()`, or the `config.json` of a workdir; what is wrong in one line."""

import json
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from shortcut_jax.config import schema
from shortcut_jax.config.schema import parse_field, unknown_key
from shortcut_jax.config.stored import complete, renamed
from shortcut_jax.errors import ConfigError, UserError

_LOCKED = re.compile(r"Key \\*\"(\w+)\\*\" does not exist and cannot be added")
_LONGEST_REASON = 300

sys.modules.setdefault("shortcut_jax.settings", schema)  # where config files of before 2026-11-27 find `default_config`


def packaged_config(name: str) -> Path | None:
    """The config file that comes with this package under a name such as `digits`, where it is no file of the user's."""
    path = Path(__file__).parents[1] / "configs" / f"{name}.py"
    return path if name.isidentifier() and path.is_file() and not Path(name).exists() else None


def load_config(path: Path, overrides: Mapping[str, str]) -> ConfigDict:
    """The config of a file with `--config.key=value` overrides, each parsed by the type of its field.

    Raises:
      ConfigError: the file is absent, fails or gives no config, or an override is no value of its field.
    """
    changes = {name: parse_field(name, text) for name, text in renamed(dict(overrides)).items()}
    _check_file(path)
    config = _read_json(path) if path.suffix == ".json" else _call(path, "get_config")
    for name, value in changes.items():
        _set(config, name, value, path)
    return config


def load_teacher_config(path: Path) -> ConfigDict | None:
    """What `get_teacher_config()` of a config file gives; None where it has none.

    Raises:
      ConfigError: the file fails.
    """
    return None if path.suffix == ".json" else _call(path, "get_teacher_config", optional=True)


def set_field(config: ConfigDict, name: str, value: Any) -> None:
    """Sets a config key by its dotted name, whatever type it had; what refers to it follows."""
    *groups, leaf = name.split(".")
    node = config
    for group in groups:
        node = node[group]
    with node.unlocked(), node.ignore_type():
        node[leaf] = value


def _set(config: ConfigDict, name: str, value: Any, path: Path) -> None:
    try:
        set_field(config, name, value)
    except (KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path}: its config has no {name}: start from config.default_config()") from None


def _check_file(path: Path) -> None:
    if path.is_dir():
        hint = f": --config={path / 'config.json'} repeats its run" if (path / "config.json").is_file() else ""
        raise ConfigError(f"--config={path} is a folder, not a config file{hint}")
    if not path.exists():
        raise ConfigError(f"the config file {path} is not found")
    if path.suffix not in (".py", ".json"):
        raise ConfigError(f"--config={path} must be a Python file (.py), or the config.json of a workdir")


def _read_json(path: Path) -> ConfigDict:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return ConfigDict(complete(stored))
    except OSError as error:
        raise ConfigError(f"the config file {path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not the config.json of a workdir: {_reason(error)}") from None


def _call(path: Path, name: str, optional: bool = False) -> Any:
    """What a function of a Python file returns, as a ConfigDict."""
    try:
        function: Callable[[], Any] | None = runpy.run_path(str(path)).get(name)
        if function is None and optional:
            return None
        config = function() if function is not None else None
    except (Exception, SystemExit) as error:
        line = _line(error, path)
        raise ConfigError(f"{path}{f', line {line}' if line else ''}: {_reason(error)}") from error
    if function is None:
        raise ConfigError(f"{path} has no {name}(): define it, and return a config (config.default_config())")
    if not isinstance(config, ConfigDict | FrozenConfigDict | dict):
        kind = type(config).__name__
        raise ConfigError(f"{path}: {name}() returns {kind}, but must return a config (config.default_config())")
    return ConfigDict(config)


def _line(error: BaseException, path: Path) -> int | None:
    """The last line of a file that an error came through."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return lines[-1] if lines else None


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "it calls sys.exit"
    text = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
    locked = _LOCKED.search(text)
    if locked:
        return unknown_key(locked[1])
    text = text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
    if isinstance(error, UserError | ConfigError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
