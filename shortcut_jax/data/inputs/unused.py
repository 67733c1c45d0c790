"""What lies in a source beside its captioned images: counted by kind, so that nothing vanishes unseen."""

import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

SYSTEM_FILES = "files of macOS or Windows (._*, .DS_Store, Thumbs.db)"
"""What `kind_of_name` calls those that systems put there by themselves."""
HIDDEN_FOLDERS = "hidden folders"
CLOSED_FOLDERS = "folders that cannot be read"
LINKED_FOLDERS = "links to folders elsewhere"
MOST_KINDS = 20

_SYSTEM_NAMES = (".ds_store", "thumbs.db", "desktop.ini", ".localized", "ehthumbs.db")


def is_system_file(name: str) -> bool:
    """Whether a file was put there by macOS or Windows: `._001.jpg` has an image's name and is none."""
    parts = name.split("/")
    return parts[-1].startswith("._") or parts[-1].lower() in _SYSTEM_NAMES or "__MACOSX" in parts


def kind_of_name(name: str) -> str:
    """What a file that nothing is made of is counted as, by its name."""
    if is_system_file(name):
        return SYSTEM_FILES
    ending = re.search(r"[^/](\.[A-Za-z0-9_-]{1,12})$", name)
    return f"{ending[1].lower()} files" if ending else "files without an ending"


def few_kinds(counts: Counter[str]) -> dict[str, int]:
    """The most frequent kinds, the others as one."""
    kept = dict(sorted(counts.items(), key=lambda kind: (-kind[1], kind[0]))[:MOST_KINDS])
    if others := counts.total() - sum(kept.values()):
        kept["files of other kinds"] = others
    return kept


def files_beside(folder: Path, is_used: Callable[[str], bool], kind: Callable[[str], str]) -> dict[str, int]:
    """Counts the files in a folder and below that are not used.

    Args:
      folder: where; hidden folders in it are counted as one each, and so are links to folders outside.
      is_used: of a path relative to the folder, with `/`.
      kind: of such a path, what the file is counted as.
    """
    counts: Counter[str] = Counter()
    real = os.path.realpath(folder)
    is_outside = lambda path: os.path.commonpath([real, os.path.realpath(path)]) != real
    for place, folders, names in os.walk(folder, onerror=lambda _: counts.update([CLOSED_FOLDERS])):
        links = (link for name in folders if os.path.islink(link := os.path.join(place, name)))
        counts[LINKED_FOLDERS] += sum(map(is_outside, links))
        hidden = [name for name in folders if name.startswith(".")]
        counts[HIDDEN_FOLDERS] += len(hidden)
        folders[:] = [name for name in folders if name not in hidden]
        inside = os.path.relpath(place, folder)
        for name in names:
            path = name if inside == "." else f"{inside}/{name}"
            if not is_used(path):
                counts[kind(path)] += 1
    return few_kinds(+counts)
