"""The train step: one pure function (state, batch) -> (state, metrics), in the paper's order."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from shortcut_jax.core.batch_split import KINDS, RowGroup, micro_batches
from shortcut_jax.core.ema import EmaSettings, num_restarts, update_ema
from shortcut_jax.core.latents import patchify
from shortcut_jax.core.loss_spikes import SpikeSettings, is_spike, observe
from shortcut_jax.core.shortcut import adaptive_weight, squared_error
from shortcut_jax.core.tree import distance, global_norm
from shortcut_jax.core.types import Array, Batch, Condition
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.steps.networks import Networks, VelocityOf, make_velocity
from shortcut_jax.steps.objectives import OBJECTIVES, ObjectiveSettings, Rows, draw, row_group
from shortcut_jax.steps.optim import OptimizerSettings, make_optimizer, make_schedule
from shortcut_jax.steps.state import TrainState, count_spike, num_updates, select_state

Metrics = dict[str, Array]
Parts = dict[str, tuple[Array, Array]]


@dataclass(frozen=True)
class StepSettings:
    """Everything static about a train step.

    Attributes:
      model: the network.
      objective: the objective and its draws.
      optimizer: AdamW and its schedule.
      ema: decays of the EMAs.
      steps: length of the run, for the learning-rate schedule.
      seed: seed of the run; the key of step k is fold_in(key(seed), k).
      accumulate: micro-batches a step.
      spikes: which steps are skipped though they are finite.
    """

    model: FluxConfig
    objective: ObjectiveSettings
    optimizer: OptimizerSettings
    ema: EmaSettings
    steps: int
    seed: int
    accumulate: int
    spikes: SpikeSettings


@lru_cache(maxsize=16)
def make_train_step(settings: StepSettings) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Composes objective, optimizer and EMAs. Jit, shardings and donation are the caller's.

    A step whose loss or gradient is not finite, or that is a spike, changes no weight, moment or EMA; it is
    counted in the state.
    """
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    schedule = make_schedule(settings.optimizer, settings.steps)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
        velocity_of = make_velocity(settings.model, *batch.latents_BhwC.shape[1:3])
        rows = make_rows(settings, key, batch, state.step / settings.steps)
        loss, parts, grads = accumulate_gradients(settings, velocity_of, state, rows)

        grad_norm = global_norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = update_ema(state.ema, params, num_updates(state), settings.ema)

        keep = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new_state = state._replace(params=params, ema=ema, opt_state=opt_state)
        if settings.spikes.factor > 0:
            spike = keep & is_spike(state.spikes, grad_norm, settings.spikes)
            keep &= ~spike
            new_state = new_state._replace(spikes=observe(state.spikes, grad_norm, settings.spikes))
            state = count_spike(state, spike)  # which stays, for a spike is not taken
        new_state = select_state(keep, new_state, state)
        metrics = {
            "loss": loss,
            **{f"loss/{kind}": total / share for kind, (total, share) in parts.items()},
            "grad_norm": grad_norm,
            "param_norm": global_norm(new_state.params),
            "ema_distance/fast": distance(new_state.params, new_state.ema.fast),
            "ema_distance/slow": distance(new_state.params, new_state.ema.slow),
            "ema_restarts": num_restarts(num_updates(new_state), settings.ema),
            "learning_rate": schedule(num_updates(state)),
            "skipped": new_state.skipped,
            "skipped_total": new_state.skipped_total,
            **({"spikes": new_state.spikes.spikes} if settings.spikes.factor > 0 else {}),
        }
        return new_state, metrics

    return train_step


def make_rows(settings: StepSettings, key: Array, batch: Batch, progress: Array | float = 0.0) -> Rows:
    """Patchifies a batch and draws its randomness, still as one global batch; see `objectives.draw`."""
    chex.assert_rank(list(batch), [4, 3, 2])
    chex.assert_equal_shape_prefix(list(batch), 1)
    constrain = settings.model.constrain
    x0_BNC = patchify(batch.latents_BhwC.astype(jnp.float32))
    draws = draw(key, x0_BNC.shape[0], x0_BNC.shape[1:], settings.objective, progress)
    draws = jax.tree.map(lambda x: constrain(x, ("batch",) + (None,) * (x.ndim - 1)), draws)
    scaled = settings.model.guidance or settings.objective.guidance_mode != "embedded"
    guidance_B = draws.guidance_B if scaled else None
    return Rows(x0_BNC, Condition(batch.txt_BMT, batch.vec_BV, guidance_B), draws)


def accumulate_gradients(
    settings: StepSettings, velocity_of: VelocityOf, state: TrainState, rows: Rows
) -> tuple[Array, Parts, Any]:
    """Loss, its parts (see `loss_parts`), and gradients: means over the micro-batches of one step."""
    evaluate = partial(loss_and_gradients, settings, velocity_of, state)
    num = settings.accumulate
    if num == 1:
        return evaluate(rows)

    constrain = settings.model.constrain
    dealt = micro_batches(rows, num, row_group(settings.objective))
    dealt = jax.tree.map(lambda x: constrain(x, (None, "batch") + (None,) * (x.ndim - 2)), dealt)

    def add(total: Any, micro: Rows) -> tuple[Any, None]:
        return jax.tree.map(lambda t, x: t + x / num, total, evaluate(micro)), None

    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), dealt)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(evaluate, first))
    return jax.lax.scan(add, zeros, dealt)[0]


def loss_and_gradients(
    settings: StepSettings, velocity_of: VelocityOf, state: TrainState, rows: Rows
) -> tuple[Array, Parts, Any]:
    """Targets first, outside the differentiated function; then the student's loss on the online weights."""
    objective = settings.objective
    networks = Networks(velocity_of, state.frozen, *state.ema, objective.guidance_mode, online=state.params)
    examples = OBJECTIVES[objective.name].examples(rows, networks, objective)
    chex.assert_equal_shape([examples.x_BNC, examples.target_BNC])
    chex.assert_shape([examples.t_B, examples.step_B], examples.x_BNC.shape[:1])
    target_BNC = jax.lax.stop_gradient(examples.target_BNC)

    def loss_fn(params: Any) -> tuple[Array, Array]:
        student = networks.student(params, rows.condition)
        error_B = squared_error(student(examples.x_BNC, examples.t_B, examples.step_B), target_BNC)
        if examples.weight_B is not None:
            error_B = error_B * examples.weight_B
        if not objective.adaptive_power:
            return jnp.mean(error_B), error_B
        weight_B = adaptive_weight(error_B, target_BNC[0].size, objective.adaptive_power)
        return jnp.mean(weight_B * error_B), error_B

    (loss, error_B), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    if objective.adaptive_power:
        loss = jnp.mean(error_B)
    return loss, loss_parts(error_B, rows.draws.teacher_B, row_group(objective)), grads


def loss_parts(error_B: Array, teacher_B: Array | None, group: RowGroup) -> Parts:
    """For each kind of row that there is (those of `KINDS`, and `teacher`): its share of the loss, and of the rows."""
    kind_B = np.tile(np.repeat(np.arange(len(KINDS)), group.counts), len(error_B) // group.size)
    learns_B = jnp.zeros(len(error_B), bool) if teacher_B is None else teacher_B & (kind_B != KINDS.index("flow"))
    masks = {name: (kind_B == i) & ~learns_B for i, name in enumerate(KINDS) if group.counts[i]}
    if teacher_B is not None:
        masks["teacher"] = learns_B
    mean = lambda x_B, mask_B: jnp.sum(jnp.where(mask_B, x_B, 0.0)) / len(error_B)
    return {kind: (mean(error_B, mask_B), mean(1.0, mask_B)) for kind, mask_B in masks.items()}
