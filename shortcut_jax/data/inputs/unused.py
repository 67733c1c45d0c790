"""Members of a tar beside its captioned images: counted by kind, so that nothing vanishes unseen."""

import re
from collections import Counter

SYSTEM_FILES = "files of macOS or Windows (._*, .DS_Store, Thumbs.db)"
"""What `kind_of_name` calls those that systems put there by themselves."""
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
