"""Command lines: absl flags and an ml_collections config, parsed without global state; errors as one line."""

import sys
import time
import traceback
import types
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags, logging

from shortcut_jax.data.format import DataError
from shortcut_jax.runtime import failures
from shortcut_jax.runtime.agreement import AgreementError
from shortcut_jax.runtime.checkpoint import CheckpointError
from shortcut_jax.runtime.converted import ConvertedError
from shortcut_jax.runtime.lobby import JoinError
from shortcut_jax.runtime.safetensors import SafetensorsError
from shortcut_jax.runtime.shared_folder import FolderError
from shortcut_jax.runtime.targets import TargetError
from shortcut_jax.settings import ConfigError
from shortcut_jax.weights.rules import ConversionError


class UsageError(ValueError):
    """A command line that cannot be run."""


class TrainingError(RuntimeError):
    """Training cannot go on: weights or losses are not finite."""


EXPECTED_ERRORS: tuple[type[Exception], ...] = (
    UsageError,
    TrainingError,
    ConfigError,
    DataError,
    CheckpointError,
    ConversionError,
    TargetError,
    ConvertedError,
    SafetensorsError,
    JoinError,
    AgreementError,
    FolderError,
    flags.Error,
)
"""Errors that are told as one line, without a traceback; the exit code is 1, or what their `exit_code` says."""


def new_flags() -> flags.FlagValues:
    """An empty set of flags with `--help`."""
    values = flags.FlagValues()
    flags.DEFINE_boolean("help", False, "Show this help.", short_name="h", flag_values=values)
    return values


def define_config(values: flags.FlagValues, name: str, help_text: str, argv: Sequence[str]) -> None:
    """Adds a flag for a config file, with `--name.key=value` overrides."""
    from ml_collections import config_flags

    config_flags.DEFINE_config_file(name, None, help_text, flag_values=values, sys_argv=list(argv))


def define_place(values: flags.FlagValues) -> None:
    """Adds the flags that tell several processes of each other, where the environment does not."""
    from shortcut_jax.runtime.joining import JOIN_TIMEOUT

    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if there are several.", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "How many processes there are.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", flag_values=values)
    flags.DEFINE_float("join_timeout", JOIN_TIMEOUT, "Seconds to wait for the others.", flag_values=values)


def parse(
    values: flags.FlagValues, argv: Sequence[str], usage: str, required: Sequence[str] = ()
) -> types.SimpleNamespace:
    """Parses a command line and returns the value of each flag by name.

    Raises:
      UsageError: unknown flags or keys, unreadable values, stray words or missing required flags, in one line.
      SystemExit: after `--help`.
    """
    try:
        rest = values(list(argv))
        # A config that could not be loaded tells so only when it is asked for.
        options = types.SimpleNamespace(**{name: values[name].value for name in values})
        for value in vars(options).values():
            hasattr(value, "items")
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
        raise UsageError(_one_line(error)) from error
    if options.help:
        print(f"{usage}\n{values.get_help()}")
        raise SystemExit(0)
    if rest[1:]:
        raise UsageError(f"unexpected argument {rest[1]!r}; {usage}")
    for name in required:
        if getattr(options, name) is None:
            raise UsageError(f"--{name} is missing; {usage}")
    return options


def _one_line(error: BaseException) -> str:
    text = str(error.args[0] if len(error.args) == 1 else error).replace("\\n", "\n").replace("\\'", "'")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = " ".join(lines).split(" Other fields present")[0]
    if isinstance(error, KeyError | AttributeError):  # whose messages come in quotes; others may end in one
        line = line.strip("'\"")
        line = f"unknown config key: {line}"
    return line or type(error).__name__


def run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> Any:
    """Runs a main and exits: its code, or 1 with one line for an expected error, or 130 for Ctrl-C.

    Where it is one of several processes, an error ends the others too.
    """
    logging.set_verbosity(logging.ERROR)  # Orbax and TFDS warn of what is meant
    try:
        code = main(sys.argv if argv is None else argv) or 0
    except EXPECTED_ERRORS as error:
        line, code = _one_line(error), getattr(error, "exit_code", 1)
        failures.fail(line, code, code)
        print(f"error: {line}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        code = 130
        failures.fail("interrupted", code, failures.LOST)
        print("interrupted", file=sys.stderr, flush=True)
    except Exception as error:
        if failures.of_another(wait=failures.INTERVAL):  # this error is its consequence
            time.sleep(failures.LINGER)  # the watching thread ends this process, with a line that says so
        failures.fail(f"{type(error).__name__}: {_one_line(error)}", 1, failures.LOST, traceback.format_exc())
        raise
    sys.exit(code)
