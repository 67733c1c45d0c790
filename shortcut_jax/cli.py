"""Command lines: absl flags and an ml_collections config, parsed without global state; errors as one line."""

import math
import os
import platform
import re
import select
import sys
import textwrap
import time
import traceback
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

from absl import flags, logging

from shortcut_jax.cluster import failures
from shortcut_jax.config.fields import field_help
from shortcut_jax.config.load import load_config, packaged_config
from shortcut_jax.config.schema import Settings, known_fields
from shortcut_jax.core.local_path import local_path
from shortcut_jax.core.version import __version__
from shortcut_jax.errors import UsageError, UserError

PATH_FLAGS = (
    *("workdir", "checkpoint", "base", "encoders", "lora", "teacher", "from_teacher", "inception", "clip"),
    *("from", "to", "out", "source", "edit", "inspect", "prompts", "eval_prompts", "reference", "save_reference"),
    *("tokenizer", "tokenizer_2", "data_dir", "tfds_dir"),
)
"""The flags, of whatever command, whose values are paths: made absolute before anything else sees them."""

_LONGEST_LINE = 400
"""Characters of what the parser of flags says: it repeats a value, however long."""


def new_flags() -> flags.FlagValues:
    """An empty set of flags with `--help` and `--version`."""
    values = flags.FlagValues()
    flags.DEFINE_boolean("help", False, "Show this help.", short_name="h", flag_values=values)
    flags.DEFINE_boolean("helpfull", False, "Show this help.", flag_values=values)
    flags.DEFINE_boolean("version", False, "Show the version.", flag_values=values)
    return values


def define_config(values: flags.FlagValues, name: str, help_text: str, argv: Sequence[str]) -> None:
    """Adds a flag for a config file, and one for each `--name.key=value` override of a command line."""
    flags.DEFINE_string(name, None, help_text, flag_values=values)
    known = known_fields()
    override = re.compile(rf"--?(?:no)?({name}\.([^=]+))(?:=.*)?", re.DOTALL)
    for argument in values.read_flags_from_files(list(argv), force_gnu=False):
        match = override.fullmatch(argument)
        if match and match[1] not in values:
            flags.DEFINE_multi_string(match[1], None, "Overrides a config key.", flag_values=values)
            values[match[1]].boolean = known.get(match[2]) is bool


def define_place(values: flags.FlagValues) -> None:
    """Adds the flags that tell several processes of each other, where the environment does not."""
    from shortcut_jax.cluster.bootstrap import JOIN_TIMEOUT

    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if there are several.", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "Number of processes.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Index of this process, from 0.", flag_values=values)
    flags.DEFINE_float("join_timeout", JOIN_TIMEOUT, "Seconds to wait for other processes.", flag_values=values)


def define_matmul_dtype(values: flags.FlagValues) -> None:
    """Adds --matmul_dtype, of the commands that compute with a converted pipeline."""
    text = "With --checkpoint: float8 for the operands of the network's large products."
    flags.DEFINE_enum("matmul_dtype", None, ["float8"], text, flag_values=values)


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


def only_with(options: types.SimpleNamespace, what: str, there: bool, names: Iterable[str]) -> None:
    """Raises UsageError where a flag is given that goes with `what`, and `what` is not `there`."""
    lost = [f"--{name}" for name in names if name in options.given]
    if lost and not there:
        raise UsageError(f"{' and '.join(lost)} can only go with {what}")


def note_unused(options: types.SimpleNamespace, reason: str, names: Iterable[str]) -> None:
    """Says which of some flags are given for nothing, and with what they are unused."""
    lost = [f"--{name}" for name in names if name in options.given]
    if lost:
        print(f"note: unused with {reason}: {', '.join(lost)}", file=sys.stderr, flush=True)


def check_finite(name: str, numbers: Iterable[float]) -> None:
    """Raises UsageError where one of an option's numbers is not finite."""
    numbers = list(numbers)
    if not all(map(math.isfinite, numbers)):
        raise UsageError(f"--{name} is {', '.join(map(str, numbers))}, but must be finite")


def whole_numbers(name: str, texts: Sequence[str], least: int, most: int | None = None) -> list[int]:
    """An option's list of whole numbers, at least one. Raises UsageError for anything else, or out of bounds."""
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
    fits = lambda t: t.isdecimal() and len(t) <= 18 and least <= int(t) <= (most or int(t))
    if not texts or not all(fits(t.strip()) for t in texts):
        given = ",".join(texts)
        raise UsageError(
            f"--{name}={given if len(given) <= 80 else given[:77] + '...'}, but must be whole numbers {bounds}"
        )
    return [int(t) for t in texts]


def parse(
    values: flags.FlagValues,
    argv: Sequence[str],
    usage: str,
    required: Sequence[str] = (),
    configs: Sequence[str] = (),
) -> types.SimpleNamespace:
    """Parses a command line.

    Args:
      values: the flags of the command.
      argv: the command and its arguments.
      usage: of the command.
      required: flags that have to be given.
      configs: flags that `define_config` added.

    Returns:
      The value of each flag by name; for each config flag the config with its overrides, and the file as `NAME_path`;
      `given`, the names of the flags on the command line, and `overridden`, the config keys on it.

    Raises:
      UsageError: unknown flags, unreadable values, a flag given twice, stray words or missing required flags.
      ConfigError: a config file that gives no config, or an override that is no value of its key.
      PathError: a path that is not one of this machine.
      SystemExit: after `--help` and `--version`.
    """
    _check_text(argv)
    try:
        rest = values(list(argv))
    except (flags.Error, ValueError) as error:
        line = _one_line(error)
        raise UsageError(line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}...") from error
    overrides = {name for name in values if name.partition(".")[0] in configs and "." in name}
    names = [name for name in values if name not in overrides]
    options = types.SimpleNamespace(**{name: values[name].value for name in names})
    options.given = frozenset(name for name in names if values[name].present)
    if options.help or options.helpfull:
        print(f"{usage}\n{values.get_help()}{config_help(configs[0]) if configs else ''}")
        raise SystemExit(0)
    if options.version:
        print(f"shortcut_jax {__version__}, jax {metadata.version('jax')}, python {platform.python_version()}")
        raise SystemExit(0)
    if rest[1:]:
        raise UsageError(f"unexpected argument {rest[1]!r}; {usage}")
    _check_given_once(values)
    _check_numbers(values)
    for name in required:
        if getattr(options, name) is None:
            raise UsageError(f"--{name} is missing; {usage}")
    for name in PATH_FLAGS:
        value = getattr(options, name, None)
        if value is not None:
            several = isinstance(value, list)
            paths = [_absolute(name, text) for text in (value if several else [value])]
            setattr(options, name, paths if several else paths[0])
    for name in configs:
        texts = {key.partition(".")[2]: values[key].value or [] for key in overrides if key.startswith(f"{name}.")}
        _load_config(options, name, {key: several[0] for key, several in texts.items() if several})
    options.overridden = frozenset(key.partition(".")[2] for key in overrides)
    return options


def _check_text(argv: Sequence[str]) -> None:
    """Raises UsageError for an argument that is not UTF-8 (Python gives its bytes as lone surrogates)."""
    for argument in argv:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UsageError(f"the argument {os.fsencode(argument)!r} is not UTF-8: write it in UTF-8") from None


def _check_given_once(values: flags.FlagValues) -> None:
    """Raises UsageError for a flag of one value that is given several times: all but the last would be lost."""
    for name in values:
        flag = values[name]
        one = "." in name or not isinstance(flag, flags.MultiFlag)
        if one and flag.present > 1:
            which = f" ({', '.join(map(str, flag.value))})" if isinstance(flag.value, list) and "." in name else ""
            raise UsageError(f"--{name} is given {flag.present} times{which}, but takes one value: give it once")


def _check_numbers(values: flags.FlagValues) -> None:
    """Raises UsageError for numbers that no flag can mean: not finite, or beyond what is counted in 32 bits."""
    for name in values:
        value = values[name].value
        numbers = value if isinstance(value, list) else [value]
        check_finite(name, [n for n in numbers if isinstance(n, float)])
        bits = 32 if name == "seed" else 31
        if any(isinstance(n, int) and abs(n) >= 2**bits for n in numbers):
            raise UsageError(f"--{name} is out of range: it must be less than 2^{bits} = {2**bits}")


def _load_config(options: types.SimpleNamespace, name: str, overrides: Mapping[str, str]) -> None:
    given = getattr(options, name)
    if given is None:
        if overrides:
            raise UsageError(f"--{name}.{min(overrides)} is given without --{name}: name the config file")
        return
    path = packaged_config(given) or local_path(given, f"--{name}")
    setattr(options, f"{name}_path", path)
    setattr(options, name, load_config(path, overrides))


def config_help(flag: str) -> str:
    """The fields of a config: name, type, default and help, a paragraph each."""
    fields = "\n".join(
        textwrap.fill(f"--{flag}.{name}: {text} ({default})", 100, initial_indent="  ", subsequent_indent="    ")
        for name, default, text in field_help(Settings())
    )
    return f"\n\nfields of a config, with their types and defaults (None unsets what may be None):\n{fields}\n"


def _absolute(name: str, given: str) -> str:
    if name == "source" and given.startswith("tfds:"):
        if "://" in given:
            local_path(given.removeprefix("tfds:"), "--source=tfds:")
        return given
    # A slash at the end says that a folder is meant.
    return str(local_path(given, f"--{name}")) + ("/" if given.endswith("/") and given.strip("/") else "")


def _one_line(error: BaseException) -> str:
    text = str(error.args[0] if len(error.args) == 1 else error)
    return " ".join(text.split()) or type(error).__name__


def _reader_has_left() -> bool:
    """Whether nobody reads the output any more, as after `| head`; what is still printed then goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    left = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> Any:
    """Runs a main and exits with its code; with 1, or the error's `exit_code`, and one line for a UserError.

    Ctrl-C is code 130. Where this is one of several processes, an error ends the others too.
    """
    logging.set_verbosity(logging.ERROR)  # Orbax and TFDS warn of what is meant
    try:
        code = main(sys.argv if argv is None else argv) or 0
    except (UserError, flags.Error) as error:
        line, code = _one_line(error), getattr(error, "exit_code", 1)
        failures.fail(line, code, code)
        print(f"error: {line}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        code = 130
        failures.fail("interrupted", code, failures.LOST)
        print("interrupted", file=sys.stderr, flush=True)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            sys.exit(1)
        if failures.of_another(wait=failures.INTERVAL):  # this error is its consequence
            time.sleep(failures.LINGER)  # the watching thread ends this process, with a line that says so
        failures.fail(f"{type(error).__name__}: {_one_line(error)}", 1, failures.LOST, traceback.format_exc())
        raise
    sys.exit(code)
