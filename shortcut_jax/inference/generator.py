"""Captions to images, in batches of one compiled shape on any mesh: what sample grids, reports and `sample` share."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from shortcut_jax.config.bounds import brief, is_unguided
from shortcut_jax.config.derive import sampling_spacing
from shortcut_jax.config.schema import Settings
from shortcut_jax.core.schedules import Spacing
from shortcut_jax.core.types import Condition
from shortcut_jax.data.records import EncodeText, fold, latent_size, stride_of, to_latents, to_pixels, unfold
from shortcut_jax.inference.request import Caption, Draws, numbered
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.run.assembly import text_encoder
from shortcut_jax.runtime.sharding import batch_sharding, batch_shards, replicated
from shortcut_jax.steps.editing import EditPlan, make_editor
from shortcut_jax.steps.sampling import make_sampler, noise_rows, seed_bits

Decode = Callable[[np.ndarray], np.ndarray]
"""latents [B, h, w, c], float32, as the network leaves them -> images [B, height, width, channels], uint8."""
Encode = Callable[[np.ndarray], np.ndarray]
"""The other way round: images -> latents."""


def bound_of(steps: int) -> int:
    """The longest grid of the program that takes `steps`: up to 64 share one, more the next power of two."""
    return max(64, 1 << (steps - 1).bit_length())


class Codec(NamedTuple):
    """What a network works between.

    Attributes:
      encode: of captions.
      decode: of latents.
      latents: of images.
    """

    encode: EncodeText
    decode: Decode
    latents: Encode


def pixel_codec(settings: Settings, cfg: FluxConfig) -> Codec:
    """Words in, pixels out: what a run on pixels needs, and nothing else."""
    stride = stride_of(settings.data)
    decode = lambda latents_BhwC: to_pixels(unfold(latents_BhwC, stride))
    latents = lambda pixels_BhwC: np.stack([fold(x_hwC, stride) for x_hwC in to_latents(pixels_BhwC)])
    return Codec(text_encoder(settings, cfg), decode, latents)


@lru_cache(maxsize=16)
def _sample_program(
    cfg: FluxConfig, size: tuple[int, int], finest: int, spacing: Spacing, mesh: Mesh
) -> Callable[..., Any]:
    """Compiled once for each method, with and without classifier-free guidance, and for trajectories.

    All generators of networks of one kind share it, such as those of several runs that are compared.
    """

    @partial(jax.jit, static_argnames=("method", "bound", "trajectory"), out_shardings=replicated(mesh))
    def sample(
        params: Any,
        seed_B: Any,
        index_B: Any,
        shift: Any,
        *rest: Any,
        method: str,
        bound: int,
        trajectory: bool,
    ) -> Any:
        sampler = make_sampler(cfg, size, bound, shift, finest, method, trajectory, spacing)
        return sampler(params, noise_rows(seed_B, index_B, cfg, *size), *rest)

    return sample


@lru_cache(maxsize=16)
def _edit_program(
    cfg: FluxConfig, size: tuple[int, int], max_steps: int, finest: int, spacing: Spacing, mesh: Mesh
) -> Callable[..., Any]:
    """Compiled once, and once more with classifier-free guidance."""

    @partial(jax.jit, out_shardings=replicated(mesh))
    def edit(params: Any, shift: Any, *rest: Any) -> Any:
        return make_editor(cfg, size, max_steps, shift, finest, spacing)(params, *rest)

    return edit


class Generator:
    """Samples images for captions from a tree of weights."""

    def __init__(
        self,
        settings: Settings,
        cfg: FluxConfig,
        mesh: Mesh,
        batch_size: int,
        max_steps: int,
        shift: float = 1.0,
        codec: Codec | None = None,
    ):
        """Prepares a sampler.

        Args:
          settings: of the run.
          cfg: the network, constrained to the mesh.
          mesh: of the devices.
          batch_size: images sampled at once, rounded up to the mesh.
          max_steps: the most steps that will be asked for.
          shift: timestep shift by default.
          codec: that of a run on pixels by default.
        """
        self._cfg, self._mesh, self._shift, self._size = cfg, mesh, shift, latent_size(settings.data)
        self._codec = codec or pixel_codec(settings, cfg)
        self.batch_size = -(-batch_size // batch_shards(mesh)) * batch_shards(mesh)
        self.max_steps = max_steps
        self._finest = max(settings.student_steps)
        self.spacing = sampling_spacing(settings)

    @cached_property
    def _sample(self) -> Callable[..., Any]:
        return _sample_program(self._cfg, self._size, self._finest, self.spacing, self._mesh)

    @cached_property
    def _edit(self) -> Callable[..., Any]:
        return _edit_program(self._cfg, self._size, self.max_steps, self._finest, self.spacing, self._mesh)

    def __call__(
        self,
        params: Any,
        captions: Sequence[Caption],
        num_steps: int,
        seed: int = 0,
        guidance: float = 1.0,
        *,
        draws: Draws | None = None,
        method: str = "euler",
        shift: float | None = None,
    ) -> np.ndarray:
        """Images [len(captions), h, w, c], uint8. Image i depends on its draw and its caption only.

        Args:
          params: weights.
          captions: one an image.
          num_steps: sampling steps, at most `max_steps`.
          seed: of the noise.
          guidance: guidance scale. A model with a guidance embedding is conditioned on it; for other models 0 and 1
            mean none, and another scale classifier-free guidance, at two evaluations a step.
          draws: noise of each image; by default the i-th of `seed`.
          method: `euler` or `heun`.
          shift: timestep shift; that of the generator by default.

        Raises:
          ValueError: a step count that the sampler was not made for, or another number of draws than captions.
        """
        self._check(num_steps)
        draws = numbered(draws, seed, len(captions))
        return self._images(params, captions, num_steps, draws, guidance, shift, method)

    def without_steps(self, params: Any, captions: Sequence[str]) -> np.ndarray:
        """All the work of a call but its steps, which shows what they cost: captions, placing, noise, decoding."""
        return self._images(params, captions, 0, numbered(None, 0, len(captions)), 1.0, None, "euler")

    def trajectory(
        self,
        params: Any,
        captions: Sequence[str],
        num_steps: int,
        seed: int = 0,
        guidance: float = 1.0,
        *,
        draws: Draws | None = None,
        method: str = "euler",
        shift: float | None = None,
    ) -> np.ndarray:
        """The images that each step aims at, and the result: [len(captions), num_steps + 1, h, w, c], uint8.

        Arguments and errors are those of a call; see `core.flow.predictions`.
        """
        self._check(num_steps)
        bound = min(bound_of(num_steps), self.max_steps)
        args = params, captions, num_steps, numbered(draws, seed, len(captions)), guidance, shift, method
        parts = []
        for kept, num in self._batches(*args, bound=bound, trajectory=True):
            along = kept[: num_steps + 1, :num]
            images = self._codec.decode(along.reshape(-1, *along.shape[2:]))
            parts.append(images.reshape(*along.shape[:2], *images.shape[1:]).swapaxes(0, 1))
        return np.concatenate(parts)

    def edit(
        self,
        params: Any,
        images_BhwC: np.ndarray,
        prompts: Sequence[tuple[Caption, Caption]],
        plan: EditPlan,
        draws: Draws | None = None,
        guidance: float = 1.0,
        source_guidance: float = 1.0,
        shift: float | None = None,
    ) -> np.ndarray:
        """Images, uint8, changed from what one prompt says to what another says; see `steps.editing`.

        Args:
          params: weights.
          images_BhwC: uint8, of the size that the model makes.
          prompts: of each image, what it shows and what it should show.
          plan: of the edit.
          draws: noise of each image; by default the i-th of seed 0.
          guidance: scale for the target.
          source_guidance: scale for the source.
          shift: timestep shift; that of the generator by default.

        Raises:
          ValueError: a plan of more steps than the generator was made for.
        """
        self._check(int(plan.steps))
        draws, shift = numbered(draws, 0, len(prompts)), self._shift if shift is None else shift
        if not self._cfg.guidance:
            guidance, source_guidance = (1.0 if is_unguided(g) else g for g in (guidance, source_guidance))
        edited = []
        for rows, _ in full_batches(len(prompts), self.batch_size):
            latents = self._place(self._codec.latents(images_BhwC[rows]))
            sources, targets = zip(*(prompts[i] for i in rows), strict=True)
            source, target = self.condition(sources, source_guidance), self.condition(targets, guidance)
            args: tuple[Any, ...] = (
                params,
                float(shift),
                latents,
                tuple(map(self._place, draw_arrays(draws, rows))),
                source,
                target,
                plan,
            )
            if not self._cfg.guidance and (guidance, source_guidance) != (1.0, 1.0):
                empty = self.condition([""] * self.batch_size, guidance)
                args = (*args, empty, (float(source_guidance), float(guidance)))
            with jax.set_mesh(self._mesh):
                edited.append(self._codec.decode(np.asarray(self._edit(*args))))
        return np.concatenate(edited)[: len(prompts)]

    def _images(self, *args: Any) -> np.ndarray:
        """Takes what `_batches` does."""
        batches = self._batches(*args, bound=self.max_steps, trajectory=False)
        return np.concatenate([self._codec.decode(latents)[:num] for latents, num in batches])

    def _batches(
        self,
        params: Any,
        captions: Sequence[Caption],
        num_steps: int,
        draws: Draws,
        guidance: float,
        shift: float | None,
        method: str,
        **options: Any,
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Latents of each batch, and how many of its rows are asked for."""
        shift = self._shift if shift is None else shift
        for rows, num in full_batches(len(captions), self.batch_size):
            condition = self.condition([captions[i] for i in rows], guidance)
            args: tuple[Any, ...] = (
                params,
                *map(self._place, draw_arrays(draws, rows)),
                float(shift),
                condition,
                num_steps,
            )
            if not (is_unguided(guidance) or self._cfg.guidance):
                args = (*args, self.condition([""] * self.batch_size, guidance), float(guidance))
            with jax.set_mesh(self._mesh):
                yield np.asarray(self._sample(*args, method=method, **options)), num

    def _check(self, num_steps: int) -> None:
        if not 1 <= num_steps <= self.max_steps:
            raise ValueError(
                f"asked for {brief(num_steps)} sampling steps, but must be 1 to {self.max_steps} (max_steps)"
            )

    def condition(self, captions: Sequence[Caption], guidance: float) -> Condition:
        """Encoded captions on the mesh, as many as it takes whole."""
        states = [self._codec.encode(c) if isinstance(c, str) else c for c in captions]
        txt, vec = (np.stack(x) for x in zip(*states, strict=True))
        scale = np.full(len(captions), guidance, np.float32) if self._cfg.guidance else None
        return jax.tree.map(self._place, Condition(txt, vec, scale))

    def _place(self, x_B: np.ndarray) -> Any:
        return jax.device_put(x_B, batch_sharding(self._mesh))


def full_batches(total: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Row numbers of each batch, always `size` of them, the last row repeated; and how many of them are new."""
    for first in range(0, total, size):
        yield np.minimum(np.arange(first, first + size), total - 1), min(total - first, size)


def draw_arrays(draws: Draws, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """seed_B and index_B of some of the draws."""
    seed_B = np.array([seed_bits(draws[i][0]) for i in rows], np.uint32)
    return seed_B, np.array([draws[i][1] for i in rows], np.int32)
