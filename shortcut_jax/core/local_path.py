"""Paths as users give them: made absolute once, where they come in, and refused where no file can have them."""

import os
import re
import unicodedata
from pathlib import Path

from shortcut_jax.errors import PathError

_REMEDIES = {
    "gs": "mount the bucket (gcsfuse) and give the folder it is mounted at",
    "s3": "mount the bucket (mount-s3) and give the folder it is mounted at",
    "hf": "download it first (hf download OWNER/NAME --local-dir FOLDER) and give that folder",
    "http": "download it first and give the file",
    "https": "download it first and give the file",
    "file": "give the path alone, without file://",
}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_HUB = re.compile(r"\w[\w.-]*")
_NO_CHARACTERS = {"Cc", "Cs", "Zl", "Zp"}
"""Control characters (NUL among them), halves of a pair, and line breaks; unusual spaces and emoji are fine."""
_MOST_BYTES_OF_A_NAME = 255
_MOST_BYTES_OF_A_PATH = 4095


def local_path(given: str | os.PathLike[str], name: str) -> Path:
    """The absolute path of what a user gave, `~` expanded; whether anything exists there is not looked at.

    Args:
      given: the path, absolute or relative to the current folder.
      name: what the error calls it, such as `--workdir`.

    Raises:
      PathError: it is empty, names remote storage (`gs://`, `s3://`, `hf://`, ...), or cannot be a path.
    """
    text = os.fspath(given)
    _check(text, name)
    try:
        path = Path(text).expanduser().absolute()
    except RuntimeError as error:  # ~somebody, who is no user here
        raise PathError(f"{name}={text} cannot be used: {error}") from None
    if len(os.fsencode(path)) > _MOST_BYTES_OF_A_PATH:
        raise PathError(f"{name}={text[:40]}... is longer than the {_MOST_BYTES_OF_A_PATH} bytes that a path may have")
    return path


def download_hint(path: Path) -> str:
    """How to get what looks like a name on the Hugging Face Hub where a path was meant; empty for any other path.

    Args:
      path: absolute, of nothing that exists.
    """
    places = [place for place in (Path.cwd(), Path.cwd().resolve()) if path.is_relative_to(place)]
    owner, name, *rest = (*(path.relative_to(places[0]).parts if places else ()), "", "")
    files = [part for part in rest if part]
    if not (_HUB.fullmatch(owner) and _HUB.fullmatch(name)) or (places[0] / owner).exists():
        return ""
    file = f" {'/'.join(files)}" if files else ""
    return (
        f": nothing is downloaded; if it is a model on the Hugging Face Hub, run hf download {owner}/{name}{file} "
        f"--local-dir {name} and give {name}{file.replace(' ', '/')}"
    )


def _check(text: str, name: str) -> None:
    if not text.strip():
        raise PathError(f"{name} is empty: give a path")
    if any(unicodedata.category(character) in _NO_CHARACTERS for character in text):
        raise PathError(f"{name}={text[:80]!r} has a character that no name may have: give another path")
    if text.startswith("pipe:"):
        raise PathError(f"{name}={text[:80]} is a command, which is not run: give files")
    scheme = _SCHEME.match(text)
    if scheme:
        remedy = _REMEDIES.get(scheme[1].lower(), "mount it and give the folder it is mounted at")
        raise PathError(f"{name}={text} is not a path on this machine: {remedy}")
    longest = max((part for part in text.split("/")), key=lambda part: len(os.fsencode(part)))
    if (length := len(os.fsencode(longest))) > _MOST_BYTES_OF_A_NAME:
        raise PathError(
            f"{name}={text[:40]}... has a name of {length} bytes, but a file's name may have {_MOST_BYTES_OF_A_NAME}"
        )
