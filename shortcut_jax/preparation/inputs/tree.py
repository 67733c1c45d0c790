"""The files of a source folder, found once; and which of them lead out of it."""

import os
import posixpath
import re
import stat
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from shortcut_jax.data.images import ENDINGS
from shortcut_jax.errors import DataError
from shortcut_jax.preparation.inputs.unused import Unread, unread

IMAGES = tuple(f".{ending}" for ending in ENDINGS)
"""Endings of images, in small letters; what cannot be decoded of them is counted when it is read."""


class Tree(NamedTuple):
    """What lies in a folder, at any depth; names are relative to it, with slashes.

    Attributes:
      folder: where it lies.
      files: sorted; a link to a file is one.
      links: which of them are links.
      unread: files that are not looked at: hidden ones, pipes and devices.
      folders: those that are not looked into -> why: hidden ones, links to folders, and those that cannot be read.
      splits: those that are not read -> their files; they are none of `files`.
    """

    folder: Path
    files: list[str]
    links: frozenset[str]
    unread: list[str]
    folders: Mapping[str, str]
    splits: Mapping[str, int] = {}

    def images(self) -> list[str]:
        """The files that are images by their endings."""
        return [name for name in self.files if is_image(name)]

    def tops(self) -> set[str]:
        """The folders directly in it that hold files."""
        return {name.partition("/")[0] for name in self.files if "/" in name}

    def below(self, part: str) -> "Tree":
        """The files of one of its folders, a split, whose others are splits too; what lies beside them is unread."""
        start = f"{part}/"
        inside = lambda names: [name.removeprefix(start) for name in names if name.startswith(start)]
        relative = lambda name: name.removeprefix(start) if name.startswith(start) else f"../{name}"
        splits = Counter(name.partition("/")[0] for name in self.files if "/" in name and not name.startswith(start))
        beside = [name for name in self.files if "/" not in name]
        beside += [name for name in self.unread if not name.startswith(start)]
        return Tree(
            self.folder / part,
            inside(self.files),
            frozenset(inside(self.links)),
            [*inside(self.unread), *map(relative, beside)],
            {relative(name): why for name, why in self.folders.items()},
            dict(sorted(splits.items())),
        )

    def check_links(self, used: Collection[str]) -> None:
        """Raises DataError where a file that is used is a link out of the folder."""
        inside = Inside(self.folder)
        for name in sorted(self.links.intersection(used)):
            if not inside.holds(name):
                raise DataError(
                    f"{self.folder / name} is a link that leads out of the folder; nothing was written. Remove it, or "
                    f"copy the file there"
                )

    def rest(self, used: Collection[str], splits: Mapping[str, int] | None = None) -> Unread:
        """What is not read; `splits` are further ones -> their files, which are in `used`."""
        left = sorted({*self.files}.difference(used)) + sorted(self.unread)
        return unread(left, self.folders, {**self.splits, **(splits or {})})


def is_image(name: str) -> bool:
    """Whether a file is an image by its ending."""
    return posixpath.splitext(name)[1].lower() in IMAGES


def walk(folder: Path) -> Tree:
    """Finds the files of a folder; links to folders are not followed."""
    files, links, others, waiting = list[str](), list[str](), list[str](), [""]
    folders: dict[str, str] = {}
    while waiting:
        directory = waiting.pop()
        try:
            entries = list(os.scandir(folder / directory))
        except OSError as error:
            if not directory:
                raise
            folders[f"{directory}/"] = error.strerror or str(error)
            continue
        for entry in entries:
            name = posixpath.join(directory, entry.name)
            if entry.name.startswith("."):
                if entry.is_dir():
                    folders[f"{name}/"] = "hidden"
                else:
                    others.append(name)
            elif entry.is_dir(follow_symlinks=False):
                waiting.append(name)
            elif entry.is_dir():
                folders[f"{name}/"] = "a link"
            elif _is_special(entry):
                others.append(name)
            else:
                files.append(name)
                if entry.is_symlink():
                    links.append(name)
    return Tree(folder, sorted(files), frozenset(links), others, folders)


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Whether it is a pipe or a device; a link to nothing is a file that is missing."""
    if entry.is_file():
        return False
    try:
        return not stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return False


class Inside:
    """Looks that names stay inside a folder; a directory is read once.

    Inside is also what a snapshot of a Hugging Face cache links to: `REPO/snapshots/REV/file -> REPO/blobs/HASH`.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        real = os.path.realpath(folder)
        self._roots = [real, *_blobs(real)]
        self._links: dict[str, set[str] | None] = {}

    def holds(self, name: str) -> bool:
        """Whether a name, relative to the folder, stays in it, links followed."""
        parts = name.replace("\\", "/").split("/")
        if posixpath.isabs(name) or ".." in parts or "\0" in name:
            return False
        directory, base = posixpath.split(posixpath.normpath(name))
        links = self._links_of(directory)
        return links is not None and (base not in links or self._is_inside(self._folder / name))

    def _links_of(self, directory: str) -> set[str] | None:
        """The links in a directory; None where it is itself outside."""
        if directory not in self._links:
            path = self._folder / directory
            if not self._is_inside(path):
                self._links[directory] = None
            else:
                try:
                    self._links[directory] = {e.name for e in os.scandir(path) if e.is_symlink()}
                except OSError:  # it does not exist: its images are counted as missing
                    self._links[directory] = set()
        return self._links[directory]

    def _is_inside(self, path: Path) -> bool:
        real = os.path.realpath(path)
        return any(os.path.commonpath([root, real]) == root for root in self._roots)


def _blobs(folder: str) -> list[str]:
    match = re.match(r"(.*/(?:datasets|models|spaces)--[^/]+)/snapshots/[^/]+(?:/|$)", folder)
    return [f"{match[1]}/blobs"] if match else []
