"""Sampling: Euler's or Heun's method on a shifted uniform grid, one compiled program for every step count."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from shortcut_jax.core.flow import integrate, predictions
from shortcut_jax.core.latents import PATCH, unpatchify
from shortcut_jax.core.schedules import Spacing, sampling_grid
from shortcut_jax.core.types import Array, Condition, Leaf
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.steps.networks import guided, make_velocity

Sampler = Callable[..., Array]


def make_sampler(
    cfg: FluxConfig,
    size: tuple[int, int],
    max_steps: int,
    shift: Array | float = 1.0,
    finest: int = 0,
    method: str = "euler",
    trajectory: bool = False,
    spacing: Spacing | None = None,
) -> Sampler:
    """A function (params, noise_BNC, condition, num_steps) -> latents [B, h, w, c].

    Args:
      cfg: the network.
      size: rows and columns of the latents.
      max_steps: the most steps it will be asked for; `num_steps` is traced.
      shift: timestep shift of the grid.
      finest: for models with a step-size input, the largest step count they were trained for; finer grids tell them
        d = 0, the instantaneous velocity.
      method: `euler` or `heun`, which averages instantaneous velocities and always conditions on d = 0.
      trajectory: whether it returns the clean images that it aims at on its way, [max_steps + 1, B, h, w, c];
        see `core.flow.predictions`.
      spacing: of the grid's times.
    """
    velocity_of = make_velocity(cfg, *size)
    tokens = size[0] // PATCH * (size[1] // PATCH)

    def sample(
        params: Any,
        noise_BNC: Array,
        condition: Condition,
        num_steps: Array,
        unconditional: Condition | None = None,
        scale: Array | float = 1.0,
    ) -> Array:
        chex.assert_shape(noise_BNC, (len(condition.txt_BMT), tokens, cfg.channels))
        velocity = velocity_of(params, condition)
        if unconditional is not None:
            velocity = guided(velocity, velocity_of(params, unconditional), scale)
        times = sampling_grid(num_steps, max_steps, shift, spacing)
        sizes = step_size_inputs(cfg, times, num_steps, finest if method == "euler" else 0)
        if not trajectory:
            return unpatchify(integrate(velocity, noise_BNC, times, num_steps, sizes, method), *size)
        kept = predictions(velocity, noise_BNC, times, num_steps, sizes, method)
        return jax.vmap(lambda x_BNC: unpatchify(x_BNC, *size))(kept)

    return sample


def step_size_inputs(cfg: FluxConfig, times: Array, num_steps: Array, finest: int) -> Array | None:
    """The step-size input at each step of a grid, [S]: d up to `finest` steps, else 0; None without such an input."""
    return jnp.where(num_steps <= finest, times[:-1] - times[1:], 0.0) if cfg.step_size else None


def draw_noise(seed: Array | int, first: Array | int, num: int, cfg: FluxConfig, height: int, width: int) -> Array:
    """Noise of samples `first` ... `first + num - 1` of a seed, [num, N, C]: sample i never depends on the batch."""
    seed_B = jnp.broadcast_to(seed_bits(seed) if isinstance(seed, int) else seed, (num,))
    return noise_rows(seed_B, first + jnp.arange(num), cfg, height, width)


def noise_rows(seed_B: Leaf, index_B: Leaf, cfg: FluxConfig, height: int, width: int) -> Array:
    """Noise [B, N, C] of rows that are sample `index_B` of seed `seed_B` each."""
    shape = (height // PATCH * (width // PATCH), cfg.channels)
    return jax.vmap(lambda seed, index: jax.random.normal(sample_key(seed, index), shape))(seed_B, index_B)


def sample_key(seed: Leaf, index: Leaf) -> Array:
    """The random key of one sample of a seed."""
    return jax.random.fold_in(jax.random.key(seed), index)


def seed_bits(seed: int) -> np.uint32:
    """A seed as the 32 bits that a random key reads of it. Raises ValueError where it has more, or is negative."""
    if not 0 <= seed < 2**32:
        raise ValueError("a seed has 32 bits, so 0 to 4294967295")
    return np.uint32(seed)
