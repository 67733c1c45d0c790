"""Captions that images are made for, and the set of captioned images that they come from."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from shortcut_jax.data.pipeline import Draw, RowMaker, evenly, read_many
from shortcut_jax.data.records import DataSettings, data_folder
from shortcut_jax.data.training import TrainingData
from shortcut_jax.errors import ConfigError
from shortcut_jax.evaluation.validation import hash_of
from shortcut_jax.inference.request import Caption
from shortcut_jax.inference.run_pipeline import Pipeline
from shortcut_jax.run.check_data import check_data


class CaptionBatch(NamedTuple):
    """Captions that images are made for.

    Attributes:
      captions: as text.
      states: of each caption, where the set that it is from has stored them.
      labels: the class of each, where the data has classes.
    """

    captions: list[str]
    states: list[Caption] | None = None
    labels: np.ndarray | None = None


class CaptionedSet:
    """The images and captions of a run's training set that have the size of its samples.

    Attributes:
      records: all of the set, in storage order.
      folder: where it lies.
    """

    def __init__(self, pipeline: Pipeline, settings: DataSettings):
        """Opens the set. Raises DataError where it is not found, ConfigError where it is not the run's."""
        self._data = TrainingData(settings)
        check_data(pipeline.settings, pipeline.assembly.model, self._data)
        size = settings.height, settings.width
        self._index = self._data.places[self._data.buckets.index(size)][0]
        self.folder = data_folder(settings)
        self.records = self._data.sets[0].records
        self._classes = dict[bytes, int]()
        self._to_row, self._codec = RowMaker(self._data, pipeline.codec.encode), pipeline.codec
        facts = (self.folder, settings.split, settings.limit, len(self._index), size)
        self.identity = " ".join(map(str, facts))

    def __len__(self) -> int:
        return len(self._index)

    def ask(self, indices: Sequence[int], total: int) -> CaptionBatch:
        """See `Subject.ask`: evenly over the set, or again from its beginning beyond its end."""
        size = len(self._index)
        picks = [i * size // total if total < size else i % size for i in indices]
        records, draws = self._read(picks)
        captions = [record["caption"].decode("utf-8") for record in records]
        labels = self._labels(records)
        if self._data.settings.text_encoder != "stored":
            return CaptionBatch(captions, None, labels)
        rows = [self._to_row(record, draw) for record, draw in zip(records, draws, strict=True)]
        return CaptionBatch(captions, [(row.txt_BMT, row.vec_BV) for row in rows], labels)

    def labelled(self, most: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Images [S, h, w, c], the class of each [S], and how many classes there are; of at most `most` images.

        Classes are labels, or captions where the set has none: `ask` tells them from then on.
        """
        picks = evenly(len(self), most)
        records, _ = self._read(picks)
        if "label" not in records[0]:
            names = sorted({record["caption"] for record in records})
            self._classes = {name: i for i, name in enumerate(names)}
        labels = self._labels(records)
        return self.images(picks), labels, len(self._classes) or 1 + int(labels.max())

    def _labels(self, records: list[dict[str, Any]]) -> Any:
        if "label" in records[0]:
            return np.array([int(record["label"]) for record in records])
        return np.array([self._classes.get(r["caption"], -1) for r in records]) if self._classes else None

    def images(self, indices: Sequence[int]) -> np.ndarray:
        """Images of the set, uint8, as the run sees them: those of latents are decoded.

        Raises:
          ConfigError: it has captions alone.
        """
        if self._data.settings.store == "captions":
            raise ConfigError("the run has captions alone to be judged against: give --reference=FILE.npz or a folder")
        records, draws = self._read(indices)
        latents = [self._to_row(record, draw).latents_BhwC for record, draw in zip(records, draws, strict=True)]
        return self._codec.decode(np.stack(latents))

    def captions(self, num: int) -> list[str]:
        """See `TrainingData.captions`."""
        return self._data.captions(num)

    def _read(self, indices: Sequence[int]) -> tuple[list[dict[str, Any]], list[Draw]]:
        places = [int(self._index[i]) for i in indices]
        draws = [Draw(0, place, drop=False, flip=False, seed=hash_of(0, place)) for place in places]
        return read_many(self.records, places), draws
