"""How far a set is: counted over the units of all processes, shown as a bar, and told at the end."""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shortcut_jax.data.format import SKIPPED, SetInfo, num_bytes
from shortcut_jax.preparation.units import UNUSED, Done, done_path, done_units, read_done

REMEDIES = {
    "members apart": "the members of a sample have to follow each other: write the tar files again in the order of "
    "names (tar --sort=name -cf NEW.tar FOLDER)",
}
"""Reason for which a record is left out -> what to do about it, where the reason alone does not tell."""


class Tally:
    """What came of the units that are done, by whatever process.

    Attributes:
      done: their indices.
      records: written.
      skipped: reason -> left out.
      sums: of `Record.sums`.
    """

    def __init__(self, work: Path, num_units: int, num_items: int | None, outdated: Iterable[int] = ()):
        """Takes the folder of the units, how many there are, and of how many images, where that is known.

        `outdated` are units that are not done until another process has written them again.
        """
        self._work, self._num_units, self._num_items = work, num_units, num_items
        self._outdated = {index: _version(done_path(work, index)) for index in outdated}
        self.done: set[int] = set()
        self.records = 0
        self.skipped: Counter[str] = Counter()
        self.sums: Counter[str] = Counter()

    def refresh(self) -> None:
        """Counts the units that were done since the last time."""
        for index in sorted(done_units(self._work) - self.done):
            if index in self._outdated and _version(done_path(self._work, index)) in (None, self._outdated[index]):
                continue
            done = read_done(self._work, index)
            self.done.add(index)
            self.records += done.num_records
            self.skipped.update(skip.reason for skip in done.skipped)
            for name, value in done.sums.items():
                self.sums[name] += value  # type: ignore[assignment]  # a Counter of floats

    @property
    def unused(self) -> dict[str, int]:
        """What nothing was made of -> how many of it."""
        return {name.removeprefix(UNUSED): int(n) for name, n in sorted(self.sums.items()) if name.startswith(UNUSED)}

    @property
    def seen(self) -> int:
        """Records, and what was left out."""
        return self.records + sum(self.skipped.values())

    @property
    def total(self) -> int | None:
        """Records of all units and what will be left out: known, or estimated from the units that are done."""
        if self._num_items is not None or not self.done:
            return self._num_items
        return round(self.seen * self._num_units / len(self.done))


class Bar:
    """The bar of a tally and the unit that is being written."""

    def __init__(self, tally: Tally, bar: Any):
        """Takes a tqdm bar."""
        self._tally, self._bar = tally, bar

    def show(self, unit: Done | None) -> None:
        """Moves the bar to where the work is; `unit` is under way."""
        skipped = len(unit.skipped) if unit else 0
        place = self._tally.seen + (unit.num_records + skipped if unit else 0)
        if unit is None or not self._bar.n:
            self._bar.total = self._tally.total
        if unit is None or skipped:
            skipped += sum(self._tally.skipped.values())
            self._bar.set_postfix_str(f"{skipped:,} skipped", refresh=False)
        self._bar.update(place - self._bar.n)


@contextlib.contextmanager
def progress_bar(tally: Tally, shown: bool) -> Iterator[Bar]:
    """One bar of records, records a second, what is skipped and the time that is left."""
    from tqdm import tqdm

    with tqdm(
        total=tally.total,
        initial=tally.seen,
        unit=" records",
        desc="prepare",
        dynamic_ncols=True,
        disable=not shown,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    ) as bar:
        yield Bar(tally, bar)


def _version(path: Path) -> tuple[int, int] | None:
    """Of a file, another one after it was written again; None where it is not found."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def skipped_text(skipped: Mapping[str, int]) -> str:
    """What was left out, by reason, the most frequent first."""
    return ", ".join(f"{n:,} {reason}" for reason, n in sorted(skipped.items(), key=lambda x: (-x[1], x[0])))


def unused_text(unused: Mapping[str, int]) -> str:
    """What nothing was made of, the most frequent first."""
    return "; ".join(f"{what} ({n:,})" for what, n in sorted(unused.items(), key=lambda x: (-x[1], x[0])))


def remedies(skipped: Mapping[str, int]) -> str:
    """What to do about the reasons for which records were left out, "" where there is nothing to say."""
    return "".join(f"; {REMEDIES[reason]}" for reason in sorted(skipped) if reason in REMEDIES)


def summary(info: SetInfo, folder: Path, seconds: float) -> list[str]:
    """What a set holds, a line each: splits by bucket, what was left out and enlarged, size and time."""
    lines = []
    for split, numbers in info.counts.items():
        sizes = [f"{n:,} of {h}x{w}" for n, (h, w) in zip(numbers, info.buckets, strict=True) if n]
        lines.append(f"{split}: {sum(numbers):,} records ({', '.join(sizes)})")
    if not info.num_records("train"):
        lines.append("there is no train split, so nothing to train on: prepare it with a smaller --validation")
    if info.skipped:
        lines.append(
            f"left out: {sum(info.skipped.values()):,} ({skipped_text(info.skipped)}), listed in {folder / SKIPPED}"
            f"{remedies(info.skipped)}"
        )
    if info.unused:
        lines.append(f"not used: {unused_text(info.unused)}")
    if info.text and info.text.cut:
        lines.append(
            f"{info.text.cut:,} of {info.total:,} captions had more than {info.text.tokens} tokens of T5 and were cut: "
            "--text_tokens keeps more"
        )
    if info.enlarged:
        lines.append(f"{info.enlarged:,} of {info.total:,} images were smaller than their bucket and were enlarged")
    lines.append(f"{folder}: {num_bytes(folder) / 1e6:,.1f} MB, {seconds:.0f} s")
    return lines
