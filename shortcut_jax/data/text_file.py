"""A text file of prompts or captions, one a line."""

from pathlib import Path

from shortcut_jax.errors import DataError


def read_lines(path: str | Path, name: str, what: str = "prompt") -> list[str]:
    """The lines of a UTF-8 file that are not blank, without white space around them.

    Args:
      path: of the file.
      name: what an error calls it, such as `--prompts=FILE`.
      what: each line is.

    Raises:
      DataError: it cannot be read, is not UTF-8, or has no line.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is {error.object[error.start]:#x}"
        raise DataError(f"{name} is not UTF-8: {found}") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise DataError(f"{name} has no {what}: write one a line")
    return texts
