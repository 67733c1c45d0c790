"""Sampling: Euler's method on a shifted uniform grid, one compiled program for every step count."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from shortcut_jax.core.flow import euler
from shortcut_jax.core.latents import PATCH, unpatchify
from shortcut_jax.core.schedules import sampling_grid
from shortcut_jax.core.types import Array, Condition
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.steps.views import guided, make_velocity

Sampler = Callable[..., Array]


def make_sampler(
    cfg: FluxConfig, height: int, width: int, max_steps: int, shift: Array | float = 1.0, finest: int = 0
) -> Sampler:
    """A function (params, noise_BNC, condition, num_steps) -> latents [B, height, width, c].

    Args:
      cfg: the network.
      height: rows of the latents.
      width: columns of the latents.
      max_steps: the most steps it will be asked for; `num_steps` is traced.
      shift: timestep shift of the grid.
      finest: for models with a step-size input, the largest step count they were trained for; finer grids tell them
        d = 0, the instantaneous velocity.
    """
    velocity_of = make_velocity(cfg, height, width)

    def sample(
        params: Any,
        noise_BNC: Array,
        condition: Condition,
        num_steps: Array,
        unconditional: Condition | None = None,
        scale: Array | float = 1.0,
    ) -> Array:
        velocity = velocity_of(params, condition)
        if unconditional is not None:
            velocity = guided(velocity, velocity_of(params, unconditional), scale)
        times = sampling_grid(num_steps, max_steps, shift)
        sizes = jnp.where(num_steps <= finest, times[:-1] - times[1:], 0.0) if cfg.step_size else None
        x_BNC = euler(velocity, noise_BNC, times, num_steps, sizes)
        return unpatchify(x_BNC, height, width)

    return sample


def draw_noise(seed: Array | int, first: Array | int, num: int, cfg: FluxConfig, height: int, width: int) -> Array:
    """Noise of samples `first` ... `first + num - 1` of a seed, [num, N, C]: sample i never depends on the batch."""
    key = jax.random.key(seed)
    shape = (height // PATCH * (width // PATCH), cfg.channels)
    one = lambda i: jax.random.normal(jax.random.fold_in(key, i), shape)
    return jax.vmap(one)(first + jnp.arange(num))
