"""WebDataset shards: tar files in which `000.jpg` and `000.txt` (or `000.json`) make a captioned picture."""

import glob
import hashlib
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shortcut_jax.data.format import DataError
from shortcut_jax.data.images import MAX_BYTES
from shortcut_jax.data.inputs.items import CAPTION_FIELDS, Item, SourceOptions, caption_in, captioned, printable
from shortcut_jax.data.units import Skip, Unit

IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "json")


class TarSource:
    """Tar files, each a unit; the fingerprint is that of their names and sizes.

    Attributes:
      units: one a file.
      num_items: None.
      fingerprint: see above.
    """

    num_items: int | None = None
    notes: tuple[str, ...] = ()

    def __init__(self, pattern: str, options: SourceOptions):
        """Finds the files.

        Args:
          pattern: a folder, a file, a glob, or a range in braces: `cc12m-{00000..01242}.tar`.
          options: how captions are found.

        Raises:
          DataError: there are none, or one that the braces name is not there.
        """
        self._field = options.caption_field
        self._paths = find_tars(pattern)
        base = os.path.commonpath([p.parent for p in self._paths])
        names = [os.path.relpath(path.with_suffix(""), base) for path in self._paths]
        self.units = [Unit(i, printable(name), None) for i, name in enumerate(names)]
        stated = "".join(f"{name} {p.stat().st_size}\n" for name, p in zip(names, self._paths, strict=True))
        self.fingerprint = hashlib.sha256(stated.encode("utf-8", "backslashreplace")).hexdigest()

    def items(self, unit: Unit) -> Iterator[Item | Skip]:
        """The pictures of a file, read once from its beginning to its end.

        What lies before a cut is kept; the cut itself is left out as one "truncated tar", whatever came behind it.

        Raises:
          DataError: a member leads out of the folder, or is neither a file nor a folder.
        """
        path = self._paths[unit.index]
        known: set[str] = set()
        group, stem = dict[str, bytes | int](), ""
        for member in _members(path):
            if isinstance(member, Skip):
                if {*IMAGES} & {*group} and {*CAPTIONS} & {*group}:
                    yield self._item(unit, stem, group, known)
                yield member._replace(key=unit.name)
                return
            name, data = member
            match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", name, re.DOTALL)
            kind = match[2].lower() if match else ""
            if match is None or kind not in (*IMAGES, *CAPTIONS):
                continue
            if group and (match[1] != stem or kind in group):
                yield self._item(unit, stem, group, known)
                group = {}
            stem, group[kind] = match[1], data
        if group:
            yield self._item(unit, stem, group, known)

    def _item(self, unit: Unit, stem: str, group: dict[str, bytes | int], known: set[str]) -> Item | Skip:
        key = f"{unit.name}/{printable(stem)}"
        if key in known:
            return Skip(key, "duplicate key")
        known.add(key)
        image = next((data for kind, data in group.items() if kind in IMAGES), None)
        if image is None:
            return Skip(key, "missing image")
        huge = next((data for data in group.values() if isinstance(data, int)), None)
        if huge is not None:
            return Skip(key, "gigantic", f"{huge:,} bytes")
        assert isinstance(image, bytes)
        caption: Any = None if self._field else group.get("txt")
        if caption is None and "json" in group:
            try:
                row = json.loads(bytes(group["json"]))
            except UnicodeDecodeError as error:
                return Skip(key, "not UTF-8", str(error))
            except (ValueError, RecursionError) as error:
                return Skip(key, "bad JSON", str(error))
            caption = caption_in(row, self._field) if isinstance(row, dict) else None
            if caption is None:
                return Skip(key, "missing field", f"its JSON has no {self._field or ', '.join(CAPTION_FIELDS)}")
        if caption is None:
            return Skip(key, "missing caption", "it has no .json" if self._field else "it has neither .txt nor .json")
        return captioned(key, image, caption)


def find_tars(pattern: str) -> list[Path]:
    """The tar files that a pattern names, sorted.

    Raises:
      DataError: there are none, or one is not there.
    """
    expanded = [Path(os.path.expanduser(name)) for name in _expand_braces(pattern)]
    found: list[Path] = []
    for path in expanded:
        if path.is_dir():
            found += path.glob("*.tar")
        elif path.is_file():
            found.append(path)
        else:
            matches = [Path(p) for p in glob.glob(str(path), recursive=True)] if glob.has_magic(str(path)) else []
            if not matches and len(expanded) > 1:
                raise DataError(f"--source={pattern} names {path}, which is not there")
            found += matches
    if not found:
        raise DataError(f"--source={pattern}: there is no such tar file")
    return sorted({Path(os.path.abspath(path)) for path in found})


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        width = len(span[1]) if span[1].startswith("0") else 0
        choices = [f"{n:0{width}d}" for n in range(int(span[1]), int(span[2]) + 1)]
    else:
        choices = match[1].split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return list(itertools.chain.from_iterable(_expand_braces(head + choice + tail) for choice in choices))


def _members(path: Path) -> Iterator[tuple[str, bytes | int] | Skip]:
    """Names and contents of the files in a tar (of a gigantic one its size), and a Skip where it is cut off."""
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # which would grow with the file
                name = _safe_name(path, member)
                if not member.isfile():
                    continue
                file = None if member.size > MAX_BYTES else tar.extractfile(member)
                data = file.read() if file else member.size
                if isinstance(data, bytes) and len(data) != member.size:
                    raise tarfile.ReadError("unexpected end of data")
                yield name, data
            end = tar.offset  # type: ignore[attr-defined]
        with path.open("rb") as raw:  # a cut between two members, or inside a header, looks like an end
            raw.seek(end)
            if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                yield Skip("", "truncated tar", f"{path.name} has no end; read to byte {end:,}")
    except DataError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        yield Skip("", "truncated tar", f"{path.name}: {error}")


def _safe_name(path: Path, member: tarfile.TarInfo) -> str:
    name = member.name.replace("\\", "/")
    if name.startswith("/") or ".." in name.split("/"):
        raise DataError(f"{path}: its member {member.name!r} leads out of the folder; nothing of this file was kept")
    if not (member.isfile() or member.isdir()):
        raise DataError(
            f"{path}: its member {member.name!r} is a link or a device, not a file; nothing of this file was kept"
        )
    return name.removeprefix("./")
