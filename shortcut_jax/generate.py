"""Captions to pictures, in batches of one compiled shape on any mesh: what sample grids, reports and `sample` share."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from shortcut_jax.assemble import Assembly, text_encoder
from shortcut_jax.core.types import Condition
from shortcut_jax.data.pipeline import EncodeText
from shortcut_jax.data.records import stride_of, to_pixels, unfold
from shortcut_jax.runtime.sharding import batch_sharding, replicated
from shortcut_jax.steps.sampling import draw_noise, make_sampler

Decode = Callable[[np.ndarray], np.ndarray]
"""latents [B, h, w, c], float32, as the network leaves them -> pictures [B, height, width, channels], uint8."""

States = tuple[np.ndarray, np.ndarray]
"""An encoded caption: txt [M, T] and vec [V]."""


class Ends(NamedTuple):
    """What a network works between.

    Attributes:
      encode: of captions.
      decode: of latents.
    """

    encode: EncodeText
    decode: Decode


def pixel_ends(assembly: Assembly) -> Ends:
    """Words in, pixels out: what a run on pixels needs, and nothing else."""
    stride = stride_of(assembly.settings.data)
    decode = lambda latents_BhwC: to_pixels(unfold(latents_BhwC, stride))
    return Ends(text_encoder(assembly.settings, assembly.model), decode)


class Generator:
    """Samples pictures for captions from a tree of weights."""

    def __init__(
        self, assembly: Assembly, batch_size: int, max_steps: int, shift: float = 1.0, ends: Ends | None = None
    ):
        """Prepares a sampler of up to `max_steps` steps; `batch_size` is rounded up to the mesh.

        `ends` are those of a run on pixels by default.
        """
        self._assembly = assembly
        self._ends = ends or pixel_ends(assembly)
        shards = assembly.mesh_shape.batch_shards
        self.batch_size = -(-batch_size // shards) * shards
        self.max_steps = max_steps
        height, width = assembly.latent_size
        finest = max(assembly.settings.student_steps)
        sampler = make_sampler(assembly.model, height, width, max_steps, shift, finest)
        noise = lambda seed, first: draw_noise(seed, first, self.batch_size, assembly.model, height, width)

        def sample(params: Any, seed: Any, first: Any, *rest: Any) -> Any:
            return sampler(params, noise(seed, first), *rest)

        self._sample = jax.jit(sample, out_shardings=replicated(assembly.mesh))

    def __call__(
        self, params: Any, captions: Sequence[str], num_steps: int, seed: int = 0, guidance: float = 1.0
    ) -> np.ndarray:
        """Pictures [len(captions), h, w, c], uint8. Picture i depends on the seed, i and its caption only.

        Args:
          params: weights.
          captions: one a picture.
          num_steps: sampling steps, at most `max_steps`.
          seed: of the noise.
          guidance: guidance scale. A model with a guidance embedding is told it; for other models a scale other than 1
            means classifier-free guidance, at two evaluations a step.

        Raises:
          ValueError: a step count that the sampler was not made for.
        """
        if not 1 <= num_steps <= self.max_steps:
            raise ValueError(f"asked for {num_steps} sampling steps, but must be 1 to {self.max_steps} (max_steps)")
        pictures = []
        for first in range(0, len(captions), self.batch_size):
            states = [self._ends.encode(c) for c in captions[first : first + self.batch_size]]
            pictures.append(self.batch(params, states, num_steps, seed, guidance, first))
        return np.concatenate(pictures)

    def batch(
        self, params: Any, states: Sequence[States], num_steps: int, seed: int, guidance: float = 1.0, first: int = 0
    ) -> np.ndarray:
        """Pictures `first` ... of a seed for encoded captions, at most `batch_size` of them; else as `__call__`."""
        args: tuple[Any, ...] = (params, seed, first, self.condition(states, guidance), num_steps)
        if guidance != 1.0 and not self._assembly.model.guidance:
            args = (*args, self.condition([self._ends.encode("")], guidance), guidance)
        with jax.set_mesh(self._assembly.mesh):
            latents = self._sample(*args)
        return self._ends.decode(np.asarray(latents)[: len(states)])

    def condition(self, states: Sequence[States], guidance: float) -> Condition:
        """Encoded captions on the mesh, the last one repeated up to `batch_size`."""
        padded = [*states, *[states[-1]] * (self.batch_size - len(states))]
        txt, vec = (np.stack(x) for x in zip(*padded, strict=True))
        scale = np.full(len(padded), guidance, np.float32) if self._assembly.model.guidance else None
        sharding = batch_sharding(self._assembly.mesh)
        return jax.tree.map(lambda x: jax.device_put(x, sharding), Condition(txt, vec, scale))
