"""WebDataset shards: tar files in which `000.jpg` and `000.txt` (or `000.json`) make a captioned image.

A member's name is split at its last ending, if that is one of an image or a caption: `photo 20.05.2024.jpg` belongs to
`photo 20.05.2024.txt`. WebDataset itself splits at the first dot, and so do tars with masks and the like beside their
images: `000.seg.png` without a caption of its own belongs to `000` where that is a sample, and is not used.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from shortcut_jax.data.images import ENDINGS as IMAGES
from shortcut_jax.preparation.inputs.items import CAPTION_FIELDS, Item, SourceOptions, caption_in, captioned, printable
from shortcut_jax.preparation.inputs.tar_files import find_tars, members, unit_name
from shortcut_jax.preparation.inputs.unused import NONE_UNREAD, Unread, few_kinds, is_system_file, kind_of_name
from shortcut_jax.preparation.units import Skip, Unit, Unused, stamp

CAPTIONS = ("txt", "json")
APART = "members apart"


class TarSource:
    """Tar files, each a unit; the fingerprint is that of their names and sizes.

    Attributes:
      units: one a file.
      num_items: None.
      fingerprint: see above.
      notes: what lies beside the files.
      unused: see `Source`.
    """

    num_items: int | None = None

    def __init__(self, pattern: str, options: SourceOptions, rest: Unread = NONE_UNREAD):
        """Finds the files.

        Args:
          pattern: a folder, a file, a glob, or a range in braces: `cc12m-{00000..01242}.tar`.
          options: how captions are found.
          rest: what lies beside the files.

        Raises:
          DataError: see `find_tars`.
        """
        self._field = options.caption_field
        self.notes, self.unused = rest
        self._paths = find_tars(pattern)
        base = os.path.commonpath([p.parent for p in self._paths])
        names = [os.path.relpath(unit_name(str(path)), base) for path in self._paths]
        self.units = [
            Unit(i, printable(name), None, stamp(path), (str(path), stamp(path)))
            for i, (name, path) in enumerate(zip(names, self._paths, strict=True))
        ]
        stated = "".join(f"{name} {p.stat().st_size}\n" for name, p in zip(names, self._paths, strict=True))
        self.fingerprint = hashlib.sha256(stated.encode("utf-8", "backslashreplace")).hexdigest()

    def items(self, unit: Unit) -> Iterator[Item | Skip | Unused]:
        """The images of a file, read once from its beginning to its end; last, what was found beside them.

        What lies before a cut is kept; the cut itself is left out as one "truncated tar", whatever came behind it.

        Raises:
          DataError: a member leads out of the folder, or is neither a file nor a folder.
        """
        samples = _Samples(unit.name, self._field)
        for member in members(self._paths[unit.index], lambda name: _split(name) is not None):
            if isinstance(member, Skip):
                yield from samples.close(cut=True)
                yield member._replace(key=unit.name)
                break
            name, data = member
            split = _split(name)
            if split is None:
                samples.unused[kind_of_name(name)] += 1
            else:
                yield from samples.add(*split, data)
        yield from samples.close()
        yield from (Unused(what, count) for what, count in few_kinds(samples.unused).items())


class _Open(NamedTuple):
    """A sample whose members are being read: its name, and their contents (of gigantic ones the size) by kind."""

    stem: str
    members: dict[str, bytes | int]

    @property
    def whole(self) -> bool:
        return bool({*IMAGES} & {*self.members} and {*CAPTIONS} & {*self.members})


class _Samples:
    """The samples of a tar, from its members in their order.

    Members of a sample follow each other, but for those of samples whose names continue its name (`a.jpg`, `a.seg.png`,
    `a.txt`), so that there is a stack of samples. What is no whole sample is kept, without its contents, to the end:
    only then it is known whether it belongs to another one, or whether its other members were somewhere else.

    Attributes:
      unused: kind -> members that nothing is made of.
    """

    def __init__(self, unit: str, caption_field: str | None):
        self._unit, self._field = unit, caption_field
        self._open: list[_Open] = []
        self._known: set[str] = set()
        self._waiting: dict[str, tuple[set[str], Skip]] = {}
        self.unused: Counter[str] = Counter()

    def add(self, stem: str, kind: str, data: bytes | int) -> Iterator[Item | Skip]:
        """Takes a member, and gives what is complete."""
        while self._open and not f"{stem}.".startswith(f"{self._open[-1].stem}."):
            yield from self._finish(self._open.pop())
        if self._open and self._open[-1].stem == stem and kind in self._open[-1].members:
            yield from self._finish(self._open.pop())
        if not self._open or self._open[-1].stem != stem:
            self._open.append(_Open(stem, {}))
        self._open[-1].members[kind] = data

    def close(self, cut: bool = False) -> Iterator[Item | Skip]:
        """Gives what is left at the end; what is not whole at a cut is part of what the cut took."""
        while self._open:
            last = self._open.pop()
            if last.whole or not cut:
                yield from self._finish(last)
        for stem, (kinds, skip) in self._waiting.items() if not cut else ():
            owner = next((name for name in _owners(stem) if name in self._known), None)
            if owner is None:
                yield skip
                continue
            for kind in kinds:
                self.unused[f"{stem[len(owner) :]}.{kind} files"] += 1

    def _finish(self, sample: _Open) -> Iterator[Item | Skip]:
        stem, kinds = sample.stem, {*sample.members}
        key = f"{self._unit}/{printable(stem)}"
        if stem in self._known:
            if sample.whole or {*IMAGES} & kinds:
                yield Skip(key, "duplicate key")
            else:
                self.unused.update(f".{kind} files" for kind in kinds)
            return
        result, used = self._result(key, sample)
        waited, _ = self._waiting.get(stem, (set(), None))
        if isinstance(result, Item) or (sample.whole and not _may_be_of_another(stem, result)):
            self._known.add(stem)
            self.unused.update(f".{kind} files" for kind in kinds - used if isinstance(result, Item))
            yield result
        elif waited and _Open(stem, dict.fromkeys(waited | kinds, b"")).whole:
            del self._waiting[stem]
            self._known.add(stem)
            yield Skip(key, APART, "its members do not follow each other")
        elif waited:
            yield Skip(key, "duplicate key")
        else:
            assert isinstance(result, Skip)
            self._waiting[stem] = (kinds, result)

    def _result(self, key: str, sample: _Open) -> tuple[Item | Skip, set[str]]:
        """What a sample is, and the members that it is made of."""
        group = sample.members
        kind = next((kind for kind in group if kind in IMAGES), None)
        if kind is None:
            return Skip(key, "missing image", f"it has only .{', .'.join(group)}"), set()
        image = group[kind]
        for data in group.values():
            if isinstance(data, int):
                return Skip(key, "gigantic", f"{data:,} bytes"), set()
        assert isinstance(image, bytes)
        if not self._field and "txt" in group:
            return captioned(key, image, group["txt"]), {kind, "txt"}
        if "json" not in group:
            told = "it has no .json" if self._field else "it has neither .txt nor .json"
            return Skip(key, "missing caption", told), set()
        caption = self._caption(key, group["json"])
        return caption if isinstance(caption, Skip) else captioned(key, image, caption), {kind, "json"}

    def _caption(self, key: str, data: Any) -> Any:
        try:
            row = json.loads(bytes(data))
        except UnicodeDecodeError as error:
            return Skip(key, "not UTF-8", str(error))
        except (ValueError, RecursionError) as error:
            return Skip(key, "bad JSON", str(error))
        caption = caption_in(row, self._field) if isinstance(row, dict) else None
        if caption is None:
            return Skip(key, "missing field", f"its JSON has no {self._field or ', '.join(CAPTION_FIELDS)}")
        return caption


def _split(name: str) -> tuple[str, str] | None:
    """The name of a sample and the kind of its member, None for what is neither an image nor a caption."""
    stem, _, kind = name.rpartition(".")
    kind = kind.lower()
    if not stem or stem.endswith("/") or kind not in (*IMAGES, *CAPTIONS) or is_system_file(name):
        return None
    return stem, kind


def _owners(stem: str) -> list[str]:
    """The samples that a sample with dots in its name may belong to, the sample itself first: `a.b`, then `a`."""
    folder, slash, base = stem.rpartition("/")
    parts = base.split(".")
    return [f"{folder}{slash}{'.'.join(parts[:n])}" for n in range(len(parts), 0, -1)]


def _may_be_of_another(stem: str, result: Item | Skip) -> bool:
    """Whether an image and its JSON may be an annotation of another image: `a.seg.png` and `a.seg.json`."""
    dotted = "." in stem.rpartition("/")[2]
    return dotted and isinstance(result, Skip) and result.reason in ("missing field", "bad JSON")
