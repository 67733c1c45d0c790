"""The validation loss of a run: held-out images, each with its own time and noise, in batches of one bucket each."""

import contextlib
import dataclasses
import sys
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from shortcut_jax.core.types import Batch
from shortcut_jax.data.pipeline import Draw, RowMaker, batches, read_many, stack_rows
from shortcut_jax.data.training import TrainingData
from shortcut_jax.run.assembly import Assembly, text_encoder
from shortcut_jax.run.check_data import check_data
from shortcut_jax.runtime.sharding import batch_sharding, process_rows, replicated, to_global
from shortcut_jax.steps.validation_loss import RULES, make_validation


class FixedBatches:
    """Step -> rows of a pass over a set in its order, bucket by bucket, and the index of each; -1 is padding."""

    def __init__(self, data: TrainingData, to_row: RowMaker, rows: np.ndarray, global_batch: int, seed: int):
        """See `data.pipeline.BatchReader`."""
        self._records, self._to_row, self._rows, self._seed = data.sets[0].records, to_row, rows, seed
        self._steps = []
        for (records,) in data.places:
            padding = -len(records) % global_batch
            padded = np.concatenate([records, np.full(padding, -1, records.dtype)])
            self._steps += list(padded.reshape(-1, global_batch))

    def __len__(self) -> int:
        return len(self._steps)

    def __call__(self, step: int) -> tuple[Batch, np.ndarray]:
        """The rows of a step, in order."""
        index_B = self._steps[step][self._rows].astype(np.int32)
        # A step has at least one record; padding repeats it.
        shown = np.where(index_B < 0, self._steps[step][0], index_B)
        records = read_many(self._records, [int(i) for i in shown])
        draw = lambda i: Draw(0, int(i), drop=False, flip=False, seed=hash_of(self._seed, int(i)))
        return stack_rows([self._to_row(r, draw(i)) for r, i in zip(records, shown, strict=True)]), index_B


def hash_of(seed: int, index: int) -> int:
    """A seed of its own for each record."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0])


class Validation:
    """Weights -> the loss by time.

    Attributes:
      num_images: held-out images.
    """

    def __init__(self, assembly: Assembly):
        """Opens the set.

        Raises:
          DataError: it or its split is not found.
          ConfigError: it is not what the run takes.
        """
        s = assembly.settings
        v = s.validation
        held_out = dataclasses.replace(
            s.data, name=v.name or s.data.name, mix=(), weights=(), split=v.split, limit=v.images
        )
        data = TrainingData(held_out)
        check_data(s, assembly.model, data)
        self.num_images = data.num_records
        self._assembly = assembly
        self._sharding = batch_sharding(assembly.mesh)
        self._rows = process_rows(self._sharding, assembly.batch_size)
        to_row = RowMaker(data, text_encoder(s, assembly.model))
        self._batches = FixedBatches(data, to_row, self._rows, assembly.batch_size, v.seed)
        validate = make_validation(assembly.model, v.rule, v.seed, s.eval.guidance)
        self._validate = jax.jit(validate, out_shardings=replicated(assembly.mesh))

    def __call__(self, params: Any, name: str) -> dict[str, float]:
        """The mean loss as `name`, and that of each time below it."""
        s, threads = self._assembly.settings, self._assembly.settings.data.threads
        total = None
        shown = {"disable": jax.process_index() > 0 or not sys.stderr.isatty(), "leave": False}
        num = len(self._batches)
        with contextlib.closing(batches(self._batches, 0, num, threads)) as steps:
            for batch, index_B in tqdm(steps, total=num, desc="validating", unit="batch", **shown):
                whole = to_global((batch, index_B), self._rows, self._sharding, self._assembly.batch_size)
                with jax.set_mesh(self._assembly.mesh):
                    sums = self._validate(params, *whole)
                total = sums if total is None else jax.tree.map(np.add, total, sums)
        loss_T, count_T = jax.device_get(total)
        values = {name: float(loss_T.sum() / count_T.sum())}
        for t, loss, count in zip(RULES[s.validation.rule], loss_T, count_T, strict=True):
            values |= {f"{name}/t={t:g}": float(loss / count)} if count else {}
        return values
