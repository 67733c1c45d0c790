"""Command lines: absl flags and an ml_collections config, parsed without global state; errors as one line."""

import math
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

from shortcut_jax.data.format import DataError
from shortcut_jax.errors import UserError
from shortcut_jax.local_path import local_path
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


class UsageError(UserError):
    """A command line that cannot be run."""


class TrainingError(RuntimeError):
    """Training cannot go on: weights or losses are not finite."""


PATH_FLAGS = (
    *("workdir", "checkpoint", "base", "encoders", "lora", "teacher", "from_teacher", "inception", "clip"),
    *("from", "to", "out", "source", "edit", "inspect", "prompts", "eval_prompts", "reference", "save_reference"),
    *("tokenizer", "tokenizer_2", "data_dir", "tfds_dir"),
)
"""The flags, of whatever command, whose values are paths: made absolute before anything else sees them."""

EXPECTED_ERRORS: tuple[type[Exception], ...] = (
    UserError,
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


def which_model(options: types.SimpleNamespace, only_with: Mapping[str, Iterable[str]], usage: str) -> str:
    """`workdir` or `checkpoint`, whichever is given.

    Args:
      options: with both, None where absent.
      only_with: for each of the two the options that go with it only, None where absent.
      usage: of the command.

    Raises:
      UsageError: neither or both are given, or an option that goes with the other one.
    """
    if (options.workdir is None) == (options.checkpoint is None):
        raise UsageError(f"give one of --workdir and --checkpoint; {usage}")
    kind, other = ("workdir", "checkpoint") if options.checkpoint is None else ("checkpoint", "workdir")
    for name in only_with[other]:
        if getattr(options, name) is not None:
            raise UsageError(f"--{name} goes with --{other}, not with --{kind}")
    return kind


def adapters(options: types.SimpleNamespace) -> list[tuple[str, float]]:
    """Each `--lora` and its `--lora_scale`, 1 by default. Raises UsageError for unequal numbers of them."""
    loras = options.lora or []
    scales = options.lora_scale or [1.0] * len(loras)
    if len(scales) != len(loras):
        raise UsageError(f"--lora is given {len(loras)} times, --lora_scale {len(scales)}: give one for each")
    return list(zip(loras, scales, strict=True))


def check_finite(name: str, numbers: Iterable[float]) -> None:
    """Raises UsageError where one of an option's numbers is not finite."""
    numbers = list(numbers)
    if not all(map(math.isfinite, numbers)):
        raise UsageError(f"--{name} is {', '.join(map(str, numbers))}, but must be finite")


def whole_numbers(name: str, texts: Sequence[str], least: int, most: int | None = None) -> list[int]:
    """An option's list of whole numbers, at least one. Raises UsageError for anything else, or out of bounds."""
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
    if not texts or not all(t.strip().isdigit() and least <= int(t) <= (most or int(t)) for t in texts):
        raise UsageError(f"--{name}={','.join(texts)}, but must be whole numbers {bounds}")
    return [int(t) for t in texts]


def read_prompts(name: str, path: str) -> list[str]:
    """The lines of an option's UTF-8 file that are not blank.

    Raises:
      UsageError: it is not there, not UTF-8, or has none.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UsageError(f"--{name}={path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is {error.object[error.start]:#x}"
        raise UsageError(f"--{name}={path} is not UTF-8: {found}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"--{name}={path} has no prompt: write one a line")
    return prompts


def parse(
    values: flags.FlagValues, argv: Sequence[str], usage: str, required: Sequence[str] = ()
) -> types.SimpleNamespace:
    """Parses a command line and returns the value of each flag by name.

    Raises:
      UsageError: unknown flags or keys, unreadable values, stray words or missing required flags, in one line.
      PathError: a path that is not one of this machine.
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
    for name in PATH_FLAGS:
        value = getattr(options, name, None)
        if value is not None:
            several = isinstance(value, list)
            paths = [_absolute(name, text) for text in (value if several else [value])]
            setattr(options, name, paths if several else paths[0])
    return options


def _absolute(name: str, given: str) -> str:
    if name == "source" and given.startswith("tfds:"):
        return given
    # A slash at the end says that a folder is meant.
    return str(local_path(given, f"--{name}")) + ("/" if given.endswith("/") and given.strip("/") else "")


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
