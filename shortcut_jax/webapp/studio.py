"""From requests to images and times: one model, one request at a time, compiling told apart from sampling."""

import dataclasses
import threading
import time
from collections.abc import Hashable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from shortcut_jax.core.version import __version__
from shortcut_jax.errors import RequestError
from shortcut_jax.inference.image_files import Record
from shortcut_jax.webapp.models import Model
from shortcut_jax.webapp.request import ModelLimits, Request

COMPARED = (1, 2, 4, 32)
"""Step counts that are shown side by side."""

SHORT, REPEATS = 0.1, 3
"""A comparison that takes fewer seconds is timed so often, and the best time taken: others use the cores too."""

MAX_PROGRAMS = 32
"""Programs that are kept compiled; when visitors have asked for more, all are dropped."""


class Answer(NamedTuple):
    """Images and what they cost.

    Attributes:
      images: [num, h, w, c], uint8.
      steps: sampling steps.
      seconds: from prompt to pixels, all images together, without the next two.
      compiling: seconds that compiling took, 0 where the programs were there.
      loading: seconds that reading weights took, 0 where they were there.
    """

    images: np.ndarray
    steps: int
    seconds: float
    compiling: float
    loading: float


class Studio:
    """Answers requests, one at a time, from any thread.

    Attributes:
      offer: what can be asked for.
    """

    def __init__(self, model: Model):
        self.offer: ModelLimits = model.offer
        self._model, self._lock = model, threading.Lock()
        self._compiled: set[Hashable] = set()
        self._closed = False

    def sample(self, request: Request) -> Answer:
        """The images of a request. Raises RequestError after `close`."""
        return self._answer(request, request.steps)

    def compare(self, request: Request) -> Iterator[Answer]:
        """One image from the same noise in each number of steps of `COMPARED`, as they are ready."""
        single = dataclasses.replace(request, num=1)
        for steps in COMPARED:
            yield self._answer(single, steps, REPEATS)

    def notes(self, request: Request) -> list[str]:
        """What a visitor should know of a request."""
        with self._lock:
            return self._model.notes(request)

    def image_size(self, height: int, width: int) -> tuple[int, int, int]:
        """Rows, columns and channels in which an image of `height` x `width` pixels is edited."""
        return self._model.image_size(height, width)

    def record(self, request: Request, steps: int, index: int) -> Record:
        """What one image of a request is made by, as `sample` records it in its PNGs."""
        made: Record = {"prompt": request.prompt, "seed": request.seed, "index": index, "steps": steps}
        made |= {"method": request.method, **self._model.facts(request), "version": __version__}
        if request.edit is not None:
            made |= {"source_prompt": request.edit.source_prompt, "skip": request.edit.skip, "plain": 0, "average": 1}
            made |= {"source_guidance": made["guidance"]}
        return made

    def close(self, timeout: float) -> bool:
        """Answers no further request; tells whether the one under way, if any, ended within so many seconds."""
        self._closed = True
        ended = self._lock.acquire(timeout=timeout)
        if ended:
            self._lock.release()
        return ended

    def _answer(self, request: Request, steps: int, repeats: int = 1) -> Answer:
        with self._lock:
            if self._closed:
                raise RequestError("the server is about to end")
            start = time.perf_counter()
            read = self._model.load(request)
            loaded = time.perf_counter()
            fresh = self._compile(request)
            compiled = time.perf_counter()
            images, seconds = self._timed(request, steps)
            for _ in range(repeats - 1 if seconds < SHORT else 0):
                seconds = min(seconds, self._timed(request, steps)[1])
        compiling, loading = fresh * (compiled - loaded), read * (loaded - start)
        return Answer(images, steps, seconds, compiling, loading)

    def _timed(self, request: Request, steps: int) -> tuple[np.ndarray, float]:
        start = time.perf_counter()
        return self._model.images(request, steps), time.perf_counter() - start

    def _compile(self, request: Request) -> bool:
        """Compiles what a request needs, by one step of it; tells whether that was needed."""
        program = self._model.program(request)
        if program in self._compiled:
            return False
        if len(self._compiled) >= MAX_PROGRAMS:
            jax.clear_caches()
            self._compiled.clear()
        self._model.images(request, 1)
        self._compiled.add(program)
        return True
