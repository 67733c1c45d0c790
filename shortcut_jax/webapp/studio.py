"""From requests to images and times: one model, one request at a time, compiling told apart from sampling."""

import dataclasses
import threading
import time
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from shortcut_jax.errors import RequestError
from shortcut_jax.inference.image_files import Record
from shortcut_jax.inference.request import ImagePipeline, ModelLimits, Row, SampleRequest, nearest_multiple, record
from shortcut_jax.webapp.request import SIZE_UNIT

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
      limits: what can be asked for.
    """

    def __init__(
        self, model: ImagePipeline, limits: ModelLimits | None = None, weights: dict[str | None, Any] | None = None
    ):
        """Serves a model within `limits`, by default its own.

        Weights are read when they are asked for, and stay; `weights` are those of views that were read before.
        """
        self.limits = model.limits if limits is None else limits
        self._model, self._lock, self._weights = model, threading.Lock(), dict(weights or {})
        self._compiled: set[Hashable] = set()
        self._closed = False

    def sample(self, request: SampleRequest) -> Answer:
        """The images of a request. Raises RequestError after `close`."""
        return self._answer(request)

    def compare(self, request: SampleRequest) -> Iterator[Answer]:
        """One image from the same noise in each number of steps of `COMPARED`, as they are ready."""
        single = dataclasses.replace(request, num=1, batch_size=self.limits.at_once and 1)
        for steps in COMPARED:
            yield self._answer(dataclasses.replace(single, steps=steps), REPEATS)

    def notes(self, request: SampleRequest) -> list[str]:
        """What a visitor should know of a request."""
        with self._lock:
            return self._model.prompt_notes(request)

    def image_size(self, height: int, width: int) -> tuple[int, int, int]:
        """Rows, columns and channels in which an image of `height` x `width` pixels is edited."""
        limits, unit = self.limits, max(self.limits.size_unit, SIZE_UNIT)
        if not limits.any_size:
            return self._model.image_size(height, width, SampleRequest(()))
        scale = min(1.0, max(limits.height, limits.width) / max(height, width))
        rows, columns = (nearest_multiple(side * scale, unit) for side in (height, width))
        return rows, columns, 3

    def record(self, request: SampleRequest, steps: int, index: int) -> Record:
        """What one image of a request is made by, as `sample` records it in its PNGs."""
        (prompt,) = request.prompts
        return record(self._model, Row(prompt, request.seed, index), dataclasses.replace(request, steps=steps))

    def close(self, timeout: float) -> bool:
        """Answers no further request; tells whether the one under way, if any, ended within so many seconds."""
        self._closed = True
        ended = self._lock.acquire(timeout=timeout)
        if ended:
            self._lock.release()
        return ended

    def _answer(self, request: SampleRequest, repeats: int = 1) -> Answer:
        with self._lock:
            if self._closed:
                raise RequestError("the server is about to end")
            start = time.perf_counter()
            read = self._load(request)
            loaded = time.perf_counter()
            fresh = self._compile(request)
            compiled = time.perf_counter()
            images, seconds = self._timed(request)
            for _ in range(repeats - 1 if seconds < SHORT else 0):
                seconds = min(seconds, self._timed(request)[1])
        compiling, loading = fresh * (compiled - loaded), read * (loaded - start)
        return Answer(images, request.steps, seconds, compiling, loading)

    def _load(self, request: SampleRequest) -> bool:
        """Reads the weights of a request, unless they are at hand; returns whether it has."""
        if request.view in self._weights:
            return False
        self._weights[request.view] = self._model.weights(request.view)
        return True

    def _timed(self, request: SampleRequest) -> tuple[np.ndarray, float]:
        start = time.perf_counter()
        return self._images(request), time.perf_counter() - start

    def _images(self, request: SampleRequest) -> np.ndarray:
        return self._model.images(request.rows, request, self._weights[request.view])

    def _compile(self, request: SampleRequest) -> bool:
        """Compiles what a request needs, by one step of it; returns whether that was needed."""
        program = self.program(request)
        if program in self._compiled:
            return False
        if len(self._compiled) >= MAX_PROGRAMS:
            jax.clear_caches()
            self._compiled.clear()
        edit = request.edit and dataclasses.replace(request.edit, skip=0)
        self._images(dataclasses.replace(request, steps=1, edit=edit))
        self._compiled.add(program)
        return True

    def program(self, request: SampleRequest) -> Hashable:
        """Which compiled programs a request needs: two requests with equal answers share all of them."""
        guided, how = self._model.guidance(request.guidance).scale != 1.0, "edit" if request.edit else request.method
        return self._model.rounded(request.batch_size), request.height, request.width, guided, how
