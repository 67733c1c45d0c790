"""The sets of a run, opened: their records by bucket, how they are mixed, the captions that are known beforehand."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from shortcut_jax.data.format import PreparedSet, SetInfo, Size
from shortcut_jax.data.records import (
    DataSettings,
    check_present,
    data_folder,
    in_memory,
    is_prepared,
    is_text,
    open_source,
    read_captions,
)
from shortcut_jax.errors import DataError


class OpenSet(NamedTuple):
    """One set of a run.

    Attributes:
      name: in the settings.
      records: by index, in storage order.
      sizes: its buckets.
      buckets: the bucket of each record that is used, an index into `sizes`.
      prepared: what it is, where `shortcut_jax.prepare` wrote it.
    """

    name: str
    records: Sequence[dict[str, Any]]
    sizes: tuple[Size, ...]
    buckets: np.ndarray
    prepared: PreparedSet | None = None

    @property
    def info(self) -> SetInfo | None:
        """What a prepared set is."""
        return self.prepared.info if self.prepared else None


def open_set(settings: DataSettings, name: str) -> OpenSet:
    """Opens one set of a run.

    Raises:
      DataError: it is absent or unreadable, or has no such split.
    """
    folder = data_folder(settings, name)
    check_present(settings, name)
    if settings.store == "captions":
        return _open_captions(settings, name)
    if not is_prepared(folder):
        return _open_plain(settings, name)
    prepared = PreparedSet(folder)
    info = prepared.info
    if info.store != settings.store:
        raise DataError(
            f"the set {folder} holds {info.store}, but data.store is {settings.store!r}: set it to {info.store!r}"
        )
    records = prepared.records(settings.split)
    if info.store == "pixels":
        records = in_memory(records, 3 * max(h * w for h, w in info.buckets))
    buckets = prepared.buckets(settings.split)
    if len(buckets) != len(records):
        raise DataError(
            f"{folder} has {len(records)} records of {settings.split!r}, but sizes of {len(buckets)}: prepare it again"
        )
    return OpenSet(name, records, info.buckets, buckets[: settings.limit or None], prepared)


def _open_plain(settings: DataSettings, name: str) -> OpenSet:
    records = open_source(settings, name)
    used = min(len(records), settings.limit or len(records))
    height, width = records[0]["image"].shape[:2]
    return OpenSet(name, records, ((height, width),), np.zeros(used, np.int64))


def _open_captions(settings: DataSettings, name: str) -> OpenSet:
    """The captions of any set, or of a text file, all of the one size that images are sampled in."""
    folder, prepared = data_folder(settings, name), None
    if is_text(settings, name):
        if settings.text_encoder == "stored":
            raise DataError(f"{folder} has no stored text states: set data.text_encoder=words, or name a prepared set")
        records: Sequence[dict[str, Any]] = read_captions(settings, name)
    elif is_prepared(folder):
        prepared = PreparedSet(folder)
        records = prepared.records(settings.split, decode=False)
    else:
        records = open_source(settings, name)
    used = min(len(records), settings.limit or len(records))
    return OpenSet(name, records, ((settings.height, settings.width),), np.zeros(used, np.int64), prepared)


class TrainingData:
    """The sets of a run.

    Attributes:
      settings: as given.
      sets: `settings.name`, then `settings.mix`.
      buckets: the sizes of all of them; those of the first set keep their order.
    """

    def __init__(self, settings: DataSettings):
        """Opens the sets; no record of a large one is read.

        Raises:
          DataError: a set is absent or unreadable, or the sets do not go together.
        """
        self.settings = settings
        self.sets = [open_set(settings, name) for name in (settings.name, *settings.mix)]
        self.buckets = tuple(dict.fromkeys(size for s in self.sets for size in s.sizes))
        self._check_mix()

    def _check_mix(self) -> None:
        first, *others = self.sets
        facts = lambda s: (s.info.latents, s.info.text and _states(s.info.text), s.info.encoders_content)
        captions, stored = self.settings.store == "captions", self.settings.text_encoder == "stored"
        for other in others if self.settings.store == "latents" or (captions and stored) else ():
            if facts(other) != facts(first):
                raise DataError(
                    f"the sets {first.name!r} and {other.name!r} cannot be mixed: their latents or text states are not "
                    f"of the same encoders ({facts(first)} and {facts(other)})"
                )

    @property
    def info(self) -> SetInfo | None:
        """What the first set is, where it was prepared."""
        return self.sets[0].info

    @property
    def num_records(self) -> int:
        """Records that are trained on."""
        return sum(len(s.buckets) for s in self.sets)

    @cached_property
    def places(self) -> list[list[np.ndarray]]:
        """The indices of the records of each set, by bucket: `places[bucket][set]`."""
        return [
            [
                np.flatnonzero(s.buckets == s.sizes.index(size)) if size in s.sizes else np.array([], int)
                for s in self.sets
            ]
            for size in self.buckets
        ]

    @cached_property
    def shares(self) -> np.ndarray:
        """The share of samples [bucket, set]: a set's weight, spread over its buckets as its records are."""
        counts = np.array([[len(ids) for ids in row] for row in self.places], np.float64)
        weights = np.array(self.settings.weights or counts.sum(axis=0))
        return counts / counts.sum(axis=0) * (weights / weights.sum())

    @property
    def epoch_sizes(self) -> tuple[int, ...]:
        """Samples of each bucket in an epoch, which has as many samples as there are records.

        With several sets that is a number, not a list: each set goes through its own records in its own time.
        """
        if len(self.sets) == 1:
            return tuple(len(row[0]) for row in self.places)
        shares = self.shares.sum(axis=1)
        return tuple(max(round(self.num_records * share), 1) if share else 0 for share in shares)

    @cached_property
    def prompts(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Caption -> text states, of the captions that the first set has stored; the empty one is among them."""
        prepared = self.sets[0].prepared
        return prepared.prompts() if prepared and prepared.info.text else {}

    def captions(self, num: int) -> list[str]:
        """Captions to draw images for: the set's own prompts, or those of its first `num` records."""
        info, records = self.info, self.sets[0].records
        if info and info.eval_prompts:
            return list(info.eval_prompts)
        return [records[i]["caption"].decode("utf-8") for i in range(min(len(records), num))]


def _states(text: Any) -> tuple[Any, ...]:
    return text.states, text.tokens, text.width, text.pooled_width
