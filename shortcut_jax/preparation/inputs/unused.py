"""What a source has beside its captioned images: counted by kind, so that nothing vanishes unseen."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

SYSTEM_FILES = "files of macOS or Windows (._*, .DS_Store, Thumbs.db)"
"""What `kind_of_name` calls those that systems put there by themselves."""
FOLDERS = "folders that were not followed"
"""Hidden ones, those that cannot be read, and links to folders: whatever lies in them."""
MOST_KINDS = 20

_SYSTEM_NAMES = (".ds_store", "thumbs.db", "desktop.ini", ".localized", "ehthumbs.db")


class Unread(NamedTuple):
    """Files and folders of a source that nothing is made of.

    Attributes:
      notes: they are, a line each.
      counts: kind -> how many of it.
    """

    notes: tuple[str, ...] = ()
    counts: Mapping[str, int] = {}


NONE_UNREAD = Unread()


def unread(files: Iterable[str], folders: Mapping[str, str], splits: Mapping[str, int]) -> Unread:
    """What is not read.

    Args:
      files: names.
      folders: names -> why they were not followed.
      splits: names of splits -> their files, of which a line tells already.
    """
    names, counts = list(files), Counter({files_of_split(split): n for split, n in splits.items()})
    counts.update(map(kind_of_name, names))
    told = [f"{len(names):,} other file{'s' * (len(names) > 1)} ({_few(names)})"] if names else []
    if folders:
        counts[FOLDERS] = len(folders)
        shown = _few([f"{name}, {why}" for name, why in sorted(folders.items())], "; ")
        told.append(f"{len(folders):,} folder{'s' * (len(folders) > 1)} not followed ({shown})")
    return Unread((f"not read: {', '.join(told)}",) if told else (), few_kinds(counts))


def files_of_split(split: str) -> str:
    """What the files of a split that is not read are counted as; "" is none."""
    return f"files of the split {split}" if split else "files of no split"


def _few(names: list[str], between: str = ", ") -> str:
    return between.join([*names[:3], *(["..."] if len(names) > 3 else [])])


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
