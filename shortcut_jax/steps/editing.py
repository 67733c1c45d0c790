"""FlowEdit (arXiv 2412.08629): an image edited by the difference of two velocities, without inverting it to noise.

The image moves by v(x, target prompt) - v(x, source prompt), both taken where noise has been added to it: what the
prompts have in common cancels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from shortcut_jax.core.flow import interpolate
from shortcut_jax.core.latents import patchify, unpatchify
from shortcut_jax.core.schedules import Spacing, sampling_grid
from shortcut_jax.core.types import Array, Condition, StepVelocity
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.steps.networks import guided, make_velocity
from shortcut_jax.steps.sampling import sample_key, step_size_inputs

Noise = Callable[[Array, Array], Array]
"""(step, draw) -> noise_BNC."""
MAX_NOISES = 1000
"""The most noises that are averaged in a step."""


class EditPlan(NamedTuple):
    """The steps of an edit; all of them may be traced.

    Attributes:
      steps: of the grid from noise to data.
      skip: first steps, the noisiest, that are left out: the more, the closer the result stays to the image. The
        paper's n_max is steps - skip.
      plain: last steps that only follow the target's velocity: the paper's n_min.
      average: noises over which the difference is averaged at each step: the paper's n_avg.
    """

    steps: Array | int
    skip: Array | int = 0
    plain: Array | int = 0
    average: Array | int = 1


def make_plan(steps: int, skip: int = 0, plain: int = 0, average: int = 1) -> EditPlan:
    """A plan of whole numbers. Raises ValueError where they do not fit each other."""
    if steps < 1 or not 1 <= average <= MAX_NOISES or min(skip, plain) < 0 or skip + plain >= steps:
        told = [n if abs(n) < 2**63 else "very many" for n in (steps, skip, plain, average)]
        raise ValueError(
            f"an edit of {told[0]} steps, {told[1]} of them skipped and {told[2]} plain, with {told[3]} noises each: "
            f"steps must be at least 1, average 1 to {MAX_NOISES}, skip and plain at least 0 and together less than "
            "steps"
        )
    return EditPlan(steps, skip, plain, average)


def flow_edit(
    source: StepVelocity,
    target: StepVelocity,
    x_BNC: Array,
    noise: Noise,
    times: Array,
    plan: EditPlan,
    step_sizes: Array | None = None,
) -> Array:
    """Edits clean latents [B, N, C]: algorithm 1 of the paper.

    Equal velocity functions give back `x_BNC` itself, unless there are plain steps.

    Args:
      source: the velocity that describes the image.
      target: the velocity that describes what it is to become.
      x_BNC: the image.
      noise: a draw for each step and average.
      times: decreasing times, shape [S + 1], S at least `plan.steps`.
      plan: 0 <= skip <= skip + plain <= steps; average at least 1.
      step_sizes: what a model with a step-size input is conditioned on at each step, shape [S]; None for other models.
    """
    chex.assert_rank([x_BNC, times], [3, 1])
    rows = x_BNC.shape[:1]
    last = plan.steps - plan.plain

    def told(k: Array) -> tuple[Array, Array | None]:
        return jnp.broadcast_to(times[k], rows), None if step_sizes is None else jnp.broadcast_to(step_sizes[k], rows)

    def step(k: Array, moved_BNC: Array) -> Array:
        t_B, d_B = told(k)

        def difference(j: Array, sum_BNC: Array) -> Array:
            source_BNC = interpolate(x_BNC, noise(k, j), t_B)
            return sum_BNC + (target(source_BNC + moved_BNC, t_B, d_B) - source(source_BNC, t_B, d_B))

        sum_BNC = jax.lax.fori_loop(0, plan.average, difference, jnp.zeros_like(x_BNC))
        return moved_BNC - (times[k] - times[k + 1]) * sum_BNC / plan.average

    def plain_step(k: Array, target_BNC: Array) -> Array:
        return target_BNC - (times[k] - times[k + 1]) * target(target_BNC, *told(k))

    # How far the image has moved: sums of it and the noise alone would not cancel exactly.
    moved_BNC = jax.lax.fori_loop(plan.skip, last, step, jnp.zeros_like(x_BNC))
    # Without plain steps times[last] is 0, and no noise is added.
    noisy_BNC = interpolate(x_BNC, noise(jnp.asarray(last), jnp.asarray(0)), jnp.broadcast_to(times[last], rows))
    return jax.lax.fori_loop(last, plan.steps, plain_step, noisy_BNC + moved_BNC)


def make_editor(
    cfg: FluxConfig,
    size: tuple[int, int],
    max_steps: int,
    shift: Array | float = 1.0,
    finest: int = 0,
    spacing: Spacing | None = None,
) -> Callable[..., Array]:
    """A function (params, latents_BhwC, draws, source, target, plan) -> edited latents [B, h, w, c].

    `draws` are seed_B and index_B of the noise, `source` and `target` conditions. With an unconditional one both are
    guided away from it, by the two `scales`. The other arguments are those of `make_sampler`.
    """
    velocity_of = make_velocity(cfg, *size)

    def edit(
        params: Any,
        latents_BhwC: Array,
        draws: tuple[Array, Array],
        source: Condition,
        target: Condition,
        plan: EditPlan,
        unconditional: Condition | None = None,
        scales: tuple[Array | float, Array | float] = (1.0, 1.0),
    ) -> Array:
        x_BNC = patchify(latents_BhwC)
        before, after = velocity_of(params, source), velocity_of(params, target)
        if unconditional is not None:
            empty = velocity_of(params, unconditional)
            before, after = (guided(v, empty, scale) for v, scale in zip((before, after), scales, strict=True))

        def noise(k: Array, j: Array) -> Array:
            fold = lambda key: jax.random.fold_in(jax.random.fold_in(key, k), j)
            draw = lambda seed, index: jax.random.normal(fold(sample_key(seed, index)), x_BNC.shape[1:])
            return jax.vmap(draw)(*draws)

        times = sampling_grid(plan.steps, max_steps, shift, spacing)
        sizes = step_size_inputs(cfg, times, jnp.asarray(plan.steps), finest)
        return unpatchify(flow_edit(before, after, x_BNC, noise, times, plan, sizes), *size)

    return edit
