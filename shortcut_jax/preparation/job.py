"""A set that is to be written: what it is made of, and where."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_jax.data.format import LatentInfo, Size, TextInfo
from shortcut_jax.preparation.units import Record, Skip, Unit, Unused

Produce = Callable[[Unit], Iterator[Record | Skip | Unused]]
"""The records of a unit, what is left out, and what is not used."""

WORK = "work"


@dataclass(frozen=True)
class Job:
    """A set that is to be written.

    Attributes:
      out: its folder.
      request: what determines its content, as JSON: a set that is there already has to agree with it.
      store: see `SetInfo`.
      buckets: the sizes of its images.
      units: what it is made of.
      num_items: records and what is left out, where that is known.
      bytes_per_record: about the least that a record takes.
      text: of a set with text states.
      latents: see `SetInfo`.
      encoders: see `SetInfo`.
      validation: share of the validation split.
      max_skipped: the largest share that may be left out.
      unused: what the source has beside what its units count -> how many of it.
      eval_prompts: captions that images are drawn for; None: the first captions of the validation split.
      prompts: eval prompts -> the arrays that `write_set` takes. Called once, by process 0.
      complete: called once, by process 0, with the folder that becomes the set and the sums of all records; may put
        further files there; returns fields of `SetInfo` that are known only now.
    """

    out: Path
    request: dict[str, Any]
    store: str
    buckets: tuple[Size, ...]
    units: Sequence[Unit]
    num_items: int | None = None
    bytes_per_record: int = 0
    text: TextInfo | None = None
    latents: LatentInfo | None = None
    encoders: dict[str, dict[str, str]] = field(default_factory=dict)
    validation: float = 0.01
    max_skipped: float = 0.01
    unused: Mapping[str, int] = field(default_factory=dict)
    eval_prompts: tuple[str, ...] | None = None
    prompts: Callable[[Sequence[str]], Mapping[str, np.ndarray]] | None = None
    complete: Callable[[Path, Mapping[str, float]], dict[str, Any]] | None = None

    @property
    def partial(self) -> Path:
        """The folder that becomes the set."""
        return self.out.with_name(f".{self.out.name}.partial")

    @property
    def work(self) -> Path:
        """Units, and what else is only needed until the set is complete."""
        return self.partial / WORK
