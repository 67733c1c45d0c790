"""What a user can get wrong: the command line prints these as one line, without a traceback.

The message says what is wrong, with the values, and how to fix it. Each class is also one of Python's own, so that
`except ValueError` does what it says.
"""

from collections.abc import Iterable


class UserError(Exception):
    """Something that the user gave, or that this machine has, cannot be used; the base of all others here."""


class UsageError(UserError, ValueError):
    """A command line that cannot be run."""


class PathError(UserError, ValueError):
    """A path that is not one of this machine's file system."""


class BoundsError(UserError, ValueError):
    """A number, a seed or a prompt that no model can be asked for."""


class ConfigError(UserError, ValueError):
    """A config that cannot run."""


class DataError(UserError, ValueError):
    """Data that are absent, unreadable or unfit."""


class ConversionError(UserError, ValueError):
    """Names, shapes or values of a checkpoint that do not fit the table of weights; the message names them."""


class SafetensorsError(UserError, ValueError):
    """A safetensors file that cannot be read; the message names it and the reason."""


class ConvertedError(UserError, RuntimeError):
    """A converted checkpoint that cannot be read or written; the message names it and the reason."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint of a run that cannot be read or written; the message names the folder and the reason."""


class FolderError(UserError, OSError):
    """A folder that cannot be written to, or that is another one for other processes."""


class ClaimError(FolderError):
    """A folder that another process writes into; the message names it."""

    def __init__(self, message: str, exit_code: int = 1):
        """`exit_code` is that of the command."""
        super().__init__(message)
        self.exit_code = exit_code


class AgreementError(UserError, ValueError):
    """Processes of one run differ in what they have to have in common."""


class JoinError(UserError, RuntimeError):
    """The processes did not come together, or one of them was lost; trying again may help."""

    exit_code = 75


class TargetError(UserError, ValueError):
    """Devices of a dry run that are not known, or that cannot be compiled for here."""


class TrainingError(UserError, RuntimeError):
    """Training cannot go on: weights or losses are not finite."""


class RequestError(UserError, ValueError):
    """A request of the web page that is not answered: what is wrong, and what would do."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError where a condition does not hold."""
    if not condition:
        raise ConfigError(message)


def one_of(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises ConfigError where a value is none of the choices."""
    require(value in tuple(choices), f"{name} is {value!r}, but must be one of {', '.join(choices)}")
