"""Parameter trees as velocity functions: online, fast, slow (and teacher) are one apply with different trees."""

from collections.abc import Callable
from typing import Any, cast

from shortcut_jax.core.latents import image_ids, text_ids
from shortcut_jax.core.types import Array, Condition, StepVelocity
from shortcut_jax.models.flux import Flux, FluxConfig

VIEWS = ("online", "fast", "slow")

VelocityOf = Callable[[Any, Condition], StepVelocity]
"""(parameters, condition) -> v(x, t, d)."""


def make_velocity(cfg: FluxConfig, height: int, width: int) -> VelocityOf:
    """Velocity functions for latents of `height` x `width`.

    The returned v(x, t, d) hands d only to a model with a step-size input; other models ignore it.
    """
    model, img_ids_N3 = Flux(cfg), image_ids(height, width)

    def velocity_of(params: Any, condition: Condition) -> StepVelocity:
        txt_ids_M3 = text_ids(condition.txt_BMT.shape[1])

        def velocity(x_BNC: Array, t_B: Array, d_B: Array | None = None) -> Array:
            out_BNC = model.apply(
                {"params": params},
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


def guided(conditional: StepVelocity, unconditional: StepVelocity, scale: Array | float) -> StepVelocity:
    """Classifier-free guidance: v_u + scale (v_c - v_u), two evaluations a step."""

    def velocity(x_BNC: Array, t_B: Array, d_B: Array | None) -> Array:
        v_u = unconditional(x_BNC, t_B, d_B)
        return v_u + scale * (conditional(x_BNC, t_B, d_B) - v_u)

    return velocity
