"""Which samples each training step takes, from the step number alone.

An epoch is a fixed shuffled list of full batches, each of one bucket. What is left of a bucket carries over into the
next epoch: after e epochs a bucket of n records has given floor(e n / G) batches of G rows. So entry k of the endless
list is known without history, whatever was read before it, by however many processes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Entry(NamedTuple):
    """The batch of one step.

    Attributes:
      bucket: of all of its rows.
      first: its first row's place in the endless stream of samples of that bucket.
      epoch: of the step.
    """

    bucket: int
    first: int
    epoch: int


class BatchSchedule:
    """The endless list of batches.

    Attributes:
      sizes: samples that an epoch has of each bucket.
      global_batch: G, rows of a batch.
    """

    def __init__(self, sizes: Sequence[int], global_batch: int, seed: int):
        """An epoch's order is a function of `seed` and its number.

        Raises:
          ValueError: there are no samples.
        """
        self.sizes, self.global_batch, self._seed = tuple(int(n) for n in sizes), global_batch, seed
        if not sum(self.sizes):
            raise ValueError("a schedule without samples")
        self._last: tuple[int, np.ndarray] | None = None

    def batches_before(self, epoch: int) -> np.ndarray:
        """Batches of each bucket in the epochs before `epoch`."""
        return np.array([epoch * n // self.global_batch for n in self.sizes])

    def leftover(self, epoch: int) -> np.ndarray:
        """Samples of each bucket that the epochs before `epoch` leave to it."""
        return np.array([epoch * n % self.global_batch for n in self.sizes])

    def epoch_of(self, step: int) -> int:
        """The epoch of a step, both counted from 0."""
        # batches_before(e) is at most e N / G in all, and at least that less one a bucket.
        total = sum(self.sizes)
        low, high = step * self.global_batch // total, (step + len(self.sizes) + 1) * self.global_batch // total + 1
        while low < high:  # the last epoch that begins at or before `step`
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.batches_before(middle).sum() <= step else (low, middle - 1)
        return low

    def _order(self, epoch: int) -> np.ndarray:
        """The bucket of each batch of an epoch, in order; the last epoch asked for is kept."""
        last = self._last
        if last is not None and last[0] == epoch:
            return last[1]
        counts = self.batches_before(epoch + 1) - self.batches_before(epoch)
        order = np.repeat(np.arange(len(counts)), counts)
        shuffled = np.random.default_rng((self._seed, epoch)).permutation(order)
        self._last = epoch, shuffled
        return shuffled

    def entry(self, step: int) -> Entry:
        """The batch of step `step`, counted from 0."""
        epoch = self.epoch_of(step)
        before, order = self.batches_before(epoch), self._order(epoch)
        place = step - int(before.sum())
        bucket = int(order[place])
        earlier = int(before[bucket]) + int(np.sum(order[:place] == bucket))
        return Entry(bucket, earlier * self.global_batch, epoch)
