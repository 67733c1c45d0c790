"""Tar files as they are found and read: by folder, glob or braces; plain or compressed; whole, cut off or damaged."""

import glob
import itertools
import math
import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from shortcut_jax.data.images import MAX_BYTES, kind_of
from shortcut_jax.errors import DataError
from shortcut_jax.preparation.inputs.unused import is_system_file
from shortcut_jax.preparation.units import Skip

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_NAMES = 1_000_000
"""That braces may expand to."""

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")
_ZSTD = b"\x28\xb5\x2f\xfd"
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_NAMED_MISSING = 3


def is_tar_name(name: str) -> bool:
    """Whether a file's name is one of a tar file in a folder; hidden ones are not, like those that macOS puts there."""
    return name.lower().endswith(ENDINGS) and not name.startswith(".")


def unit_name(path: str) -> str:
    """The path of a tar file without the ending."""
    return path[: -len(".tar")] if path.lower().endswith(".tar") else path


def find_tars(pattern: str) -> list[Path]:
    """The tar files that a pattern names, sorted.

    Args:
      pattern: a folder, a file, a glob, or a range in braces: `cc12m-{00000..01242}.tar`.

    Raises:
      DataError: there are none, one is not found, is no file or may not be read, or the braces name too many.
    """
    pattern = os.path.expanduser(pattern)
    literal = os.path.lexists(pattern)  # a file may have braces in its name
    several = not literal and _check_braces(pattern) > 1
    found, missing, number = set[Path](), list[str](), 0
    for name in [pattern] if literal else _expand_braces(pattern):
        matches = _matches(name)
        found.update(Path(os.path.abspath(path)) for path in matches)
        number += not matches
        if not matches and len(missing) < _NAMED_MISSING:
            missing.append(name)
    if missing and several:
        more = f" and {number - len(missing):,} more" if number > len(missing) else ""
        raise DataError(f"--source={pattern} names {', '.join(missing)}{more}, which {_is(number)} not found")
    if not found:
        raise DataError(f"--source={pattern}: there is no such tar file")
    paths = sorted(found)
    _check_readable(paths)
    return paths


def members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes | int] | Skip]:
    """Names and contents of the files in a tar, compressed or not; a Skip, the last, where it is cut off or damaged.

    Args:
      path: of the tar file.
      wanted: of a name, whether the content is; of the others, and of gigantic ones, the size is given in its place.

    Raises:
      DataError: a member leads out of the folder, or is neither a file nor a folder; the file cannot be read.
    """
    try:
        yield from _members(path, wanted)
    except DataError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        yield Skip("", "truncated tar", f"{path.name}: {error}")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; what is done is kept") from error


def _members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes | int] | Skip]:
    with path.open("rb") as file:
        start, size = file.read(8), os.fstat(file.fileno()).st_size
    if start.startswith(_ZSTD):
        raise DataError(f"{path} is compressed with zstd, which is not read: decompress it first (zstd -d)")
    compressed = start.startswith(_COMPRESSED)
    headers, last = _recorded_headers()
    with tarfile.open(path, "r|*" if compressed else "r:", tarinfo=headers) as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # which would grow with the file
            name = _safe_name(path, member)
            if not member.isfile():
                continue
            stated = 0 if member.issparse() else member.size
            if stated < 0 or (not compressed and member.offset_data + stated > size):
                yield Skip(
                    "", "truncated tar", f"{path.name}: {name} has {stated:,} bytes by its header, more than the file"
                )
                return
            file_in = tar.extractfile(member) if member.size <= MAX_BYTES and wanted(name) else None
            data = file_in.read() if file_in else member.size
            if isinstance(data, bytes) and len(data) != member.size:
                raise tarfile.ReadError("unexpected end of data")
            yield name, data
        if last != [bytes(tarfile.BLOCKSIZE)]:  # a cut between two members, or inside a header, looks like an end
            yield Skip("", "truncated tar", f"{path.name} has no end; read to byte {tar.offset:,}")  # type: ignore[attr-defined]


def _recorded_headers() -> tuple[type[tarfile.TarInfo], list[bytes]]:
    """A class of members for tarfile, and the header that it read last: of a whole file that of the end, zeros."""
    last: list[bytes] = []

    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str | None, errors: str) -> "Header":
            last[:] = [bytes(buf)]
            return super().frombuf(buf, encoding, errors)  # type: ignore[return-value, arg-type]

    return Header, last


def _safe_name(path: Path, member: tarfile.TarInfo) -> str:
    name = member.name.replace("\\", "/")
    if name.startswith("/") or ".." in name.split("/"):
        raise DataError(f"{path}: its member {member.name!r} leads out of the folder; nothing of this file was kept")
    if not (member.isfile() or member.isdir()):
        raise DataError(
            f"{path}: its member {member.name!r} is a link or a device, not a file; nothing of this file was kept. "
            f"tar --dereference --hard-dereference stores the files themselves"
        )
    return name.removeprefix("./")


def _matches(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        return [p for p in path.iterdir() if is_tar_name(p.name) and not p.is_dir()]
    if os.path.lexists(path):
        return [path]
    found = (Path(p) for p in glob.glob(name, recursive=True)) if glob.has_magic(name) else ()
    return [p for p in found if not p.is_dir() and not is_system_file(p.name)]


def _check_readable(paths: list[Path]) -> None:
    for path in paths:
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(mode):
            raise DataError(f"{path} is {kind_of(mode)}, not a tar file: take it out of the source")
        if not os.access(path, os.R_OK):
            raise DataError(f"{path} cannot be read: you have no permission to")


def _is(number: int) -> str:
    return "is" if number == 1 else "are"


def _check_braces(pattern: str) -> int:
    """How many names a pattern has."""
    number = math.prod(_number(inner) for inner in _BRACES.findall(pattern))
    if number > MAX_NAMES:
        raise DataError(f"--source={pattern} names {number:,} files, more than {MAX_NAMES:,}: narrow the braces")
    return number


def _number(inner: str) -> int:
    span = _RANGE.fullmatch(inner)
    return abs(int(span[2]) - int(span[1])) + 1 if span else inner.count(",") + 1


def _expand_braces(pattern: str) -> Iterator[str]:
    match = _BRACES.search(pattern)
    if not match:
        return iter([pattern])
    span = _RANGE.fullmatch(match[1])
    if span:
        width = len(span[1]) if span[1].startswith("0") else 0
        low, high = sorted((int(span[1]), int(span[2])))
        choices: Iterator[str] = (f"{n:0{width}d}" for n in range(low, high + 1))
    else:
        choices = iter(match[1].split(","))
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return itertools.chain.from_iterable(_expand_braces(head + choice + tail) for choice in choices)
