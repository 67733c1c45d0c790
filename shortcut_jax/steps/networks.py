"""Parameter trees as velocity functions: online, fast, slow and teacher are one apply with different trees.

The only file that knows whether all weights are trained, or adapters on a frozen base.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from shortcut_jax.core.flow import per_row
from shortcut_jax.core.latents import image_ids, text_ids
from shortcut_jax.core.types import Array, Condition, StepVelocity
from shortcut_jax.models.flux import Flux, FluxConfig, float8_scales
from shortcut_jax.models.lora import concatenate, scales

VIEWS = ("online", "fast", "slow")
TEACHER = "teacher"


class GuidanceMode(NamedTuple):
    """Where the guidance scale of a row enters training: a row of `GUIDANCE_MODES`.

    Attributes:
      student: whether the student is guided (classifier-free, two evaluations).
      jumps: whether the jumps of the model's own EMAs are.
      teacher: whether the teacher's jump is.
      distils: whether guidance goes into a guidance embedding, which the student then needs.
    """

    student: bool = False
    jumps: bool = False
    teacher: bool = False
    distils: bool = False


GUIDANCE_MODES = {
    # Fed to the guidance embedding of all networks, if there is one; nothing is computed with it.
    "embedded": GuidanceMode(),
    "cfg": GuidanceMode(student=True, jumps=True, teacher=True),
    "distill": GuidanceMode(teacher=True, distils=True),
    "cfg_targets": GuidanceMode(jumps=True, teacher=True, distils=True),  # compounds; kept to show that
}


class Frozen(NamedTuple):
    """What training reads and never changes; all None where there is no base.

    Attributes:
      base: weights of the whole network: what adapters are added to, and the teacher.
      scale: what the adapters' products are multiplied by, a scalar; None where all weights are trained.
      teacher: adapters that make the base the teacher; None for the bare base.
      unconditional: the empty caption, one row; None where no classifier-free guidance is computed.
    """

    base: Any = None
    scale: Array | None = None
    teacher: Any = None
    unconditional: Condition | None = None


class Adapted(NamedTuple):
    """A base with adapters.

    Attributes:
      base: weights of the whole network.
      lora: adapters, nested like the layers they belong to.
      scale: a scalar, or [B, r] where rows have scales of their own.
    """

    base: Any
    lora: Any
    scale: Array


Weights = Any
"""Weights of the whole network, as a parameter tree or as `Adapted`."""

VelocityOf = Callable[..., StepVelocity]
"""(weights, condition) -> v(x, t, d); with `forward=True` one that `jax.jvp` differentiates, without gradients."""


def bind_adapters(train: Any, frozen: Frozen) -> Weights:
    """A network from what is trained: an online, fast or slow tree."""
    return train if frozen.scale is None else Adapted(frozen.base, train, frozen.scale)


def teacher_weights(frozen: Frozen) -> Weights:
    """The teacher: the base, with its own adapters if it has any."""
    if frozen.teacher is None or frozen.scale is None:
        return frozen.base
    return Adapted(frozen.base, frozen.teacher, frozen.scale)


def per_sample_mixture(train: Any, frozen: Frozen, teacher_B: Array) -> Adapted:
    """One network that is the teacher for the rows of `teacher_B` and `train` for the others, by gains of 0 and 1."""
    if frozen.scale is None:
        raise ValueError("only adapters can be switched by row")
    gain_B1 = frozen.scale * (1.0 - teacher_B.astype(jnp.float32))[:, None]
    if frozen.teacher is None:
        return Adapted(frozen.base, train, gain_B1)
    lora = concatenate(train, frozen.teacher)
    (rank,) = {leaf.shape[-1] // 2 for path, leaf in jax.tree_util.tree_leaves_with_path(lora) if path[-1].key == "a"}
    gain_BR = jnp.concatenate([gain_B1.repeat(rank, 1), (frozen.scale - gain_B1).repeat(rank, 1)], axis=1)
    return Adapted(frozen.base, lora, gain_BR)


def collections(weights: Weights, float8: bool = False) -> dict[str, Any]:
    """Weights as the collections that the network is applied with."""
    base = weights.base if isinstance(weights, Adapted) else weights
    found = {"params": base, **(float8_scales(base) if float8 else {})}
    if isinstance(weights, Adapted):
        found |= {"lora": weights.lora, "lora_scale": scales(weights.lora, weights.scale)}
    return found


@functools.lru_cache(maxsize=64)
def _traced_once(cfg: FluxConfig) -> Callable[..., Any]:
    """The network, traced once for all passes and programs that have the same shapes."""
    return jax.jit(Flux(cfg).apply)


def make_velocity(cfg: FluxConfig, height: int, width: int) -> VelocityOf:
    """Velocity functions for latents of `height` x `width`.

    The returned v(x, t, d) hands d only to a model with a step-size input; other models ignore it.
    """

    def velocity_of(weights: Weights, condition: Condition, forward: bool = False) -> StepVelocity:
        apply = _traced_once(dataclasses.replace(cfg, forward_mode=forward))
        img_ids_N3, txt_ids_M3 = image_ids(height, width), text_ids(condition.txt_BMT.shape[1])

        def velocity(x_BNC: Array, t_B: Array, d_B: Array | None = None) -> Array:
            out_BNC = apply(
                collections(weights, cfg.matmul_dtype == "float8"),
                x_BNC,
                t_B,
                condition.txt_BMT,
                condition.vec_BV,
                img_ids_N3,
                txt_ids_M3,
                condition.guidance_B if cfg.guidance else None,
                d_B if cfg.step_size else None,
            )
            return cast(Array, out_BNC)

        return velocity

    return velocity_of


def guided(
    conditional: StepVelocity, unconditional: StepVelocity, scale: Array | float, rows_B: Array | None = None
) -> StepVelocity:
    """Classifier-free guidance: v_u + scale (v_c - v_u), two evaluations a step.

    Args:
      conditional: v_c.
      unconditional: v_u.
      scale: a number, or one a row.
      rows_B: the rows it is for; the others get v_c. None means all.
    """

    def velocity(x_BNC: Array, t_B: Array, d_B: Array | None) -> Array:
        v_c, v_u = conditional(x_BNC, t_B, d_B), unconditional(x_BNC, t_B, d_B)
        factor = per_row(scale, x_BNC) if isinstance(scale, jax.Array) and scale.ndim else scale
        v_BNC = v_u + factor * (v_c - v_u)
        return v_BNC if rows_B is None else jnp.where(per_row(rows_B, x_BNC), v_BNC, v_c)

    return velocity


def unconditional_rows(frozen: Frozen, condition: Condition) -> Condition:
    """The empty caption for every row of a condition, its guidance kept."""
    if frozen.unconditional is None:
        raise ValueError("classifier-free guidance needs the empty caption")
    like = lambda x, rows: jnp.broadcast_to(x, rows.shape)
    txt, vec, _ = frozen.unconditional
    return condition._replace(txt_BMT=like(txt, condition.txt_BMT), vec_BV=like(vec, condition.vec_BV))


class Networks:
    """The networks of a step as functions of the condition, guided as `guidance_mode` (of `GUIDANCE_MODES`) says.

    `networks.slow(condition)` is a v(x, t, d).
    """

    def __init__(
        self,
        velocity_of: VelocityOf,
        frozen: Frozen,
        fast: Any,
        slow: Any,
        guidance_mode: str,
        online: Any = None,
    ):
        """Takes both EMAs of what is trained, what is frozen, and for `forward` what is trained itself."""
        self._velocity_of, self._frozen, self._mode = velocity_of, frozen, GUIDANCE_MODES[guidance_mode]
        self._fast, self._slow, self._online = fast, slow, online

    def student(self, train: Any, condition: Condition) -> StepVelocity:
        """The network that learns; gradients flow through both branches of its guidance."""
        return self._guided(bind_adapters(train, self._frozen), condition, self._mode.student)

    def slow(self, condition: Condition) -> StepVelocity:
        """The slow EMA."""
        return self._guided(bind_adapters(self._slow, self._frozen), condition, self._mode.jumps)

    def forward(self, condition: Condition) -> StepVelocity:
        """The network that learns, for `jax.jvp`."""
        return self._velocity_of(bind_adapters(self._online, self._frozen), condition, forward=True)

    def first(self, condition: Condition, teacher_B: Array | None) -> StepVelocity:
        """The teacher for the rows of `teacher_B` and the fast EMA for the others; the latter for all if None."""
        if teacher_B is None:
            return self._guided(bind_adapters(self._fast, self._frozen), condition, self._mode.jumps)
        velocity = self._first(condition, teacher_B)
        if not self._mode.teacher:
            return velocity
        empty = self._first(unconditional_rows(self._frozen, condition), teacher_B)
        return guided(velocity, empty, _scale(condition), None if self._mode.jumps else teacher_B)

    def _first(self, condition: Condition, teacher_B: Array) -> StepVelocity:
        frozen = self._frozen
        if frozen.scale is not None:
            return self._velocity_of(per_sample_mixture(self._fast, frozen, teacher_B), condition)
        teacher, fast = (self._velocity_of(w, condition) for w in (teacher_weights(frozen), self._fast))
        return lambda x_BNC, t_B, d_B: jnp.where(
            per_row(teacher_B, x_BNC), teacher(x_BNC, t_B, d_B), fast(x_BNC, t_B, d_B)
        )

    def _guided(self, weights: Weights, condition: Condition, on: bool) -> StepVelocity:
        velocity = self._velocity_of(weights, condition)
        if not on:
            return velocity
        empty = self._velocity_of(weights, unconditional_rows(self._frozen, condition))
        return guided(velocity, empty, _scale(condition))


def _scale(condition: Condition) -> Array:
    if condition.guidance_B is None:
        raise ValueError("classifier-free guidance needs a scale for each row")
    return cast(Array, condition.guidance_B)


def evaluations(guidance_mode: str, adapters: bool, teacher: bool) -> tuple[int, int, int]:
    """Forward passes of a row: in the student, in one of the first jumps, in one of the slow EMA's."""
    row, networks = GUIDANCE_MODES[guidance_mode], 2 if teacher and not adapters else 1
    return 1 + row.student, networks * (1 + (row.teacher if teacher else row.jumps)), 1 + row.jumps
