"""The train state: everything a step reads and writes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shortcut_jax.core.ema import DualEma, init_ema
from shortcut_jax.core.types import Array


class TrainState(NamedTuple):
    """One pytree, donated to each step.

    Attributes:
      step: training steps done, skipped ones included (int32).
      params: the online weights.
      ema: fast and slow average of the weights, float32.
      opt_state: optax state.
      skipped: skipped steps in a row, up to now (int32).
      skipped_total: skipped steps in all (int32).
    """

    step: Array
    params: Any
    ema: DualEma
    opt_state: Any
    skipped: Array
    skipped_total: Array


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step: both averages are copies of the weights."""
    zero = lambda: jnp.zeros((), jnp.int32)
    return TrainState(zero(), params, init_ema(params), optimizer.init(params), zero(), zero())


def choose_view(state: TrainState, view: str) -> Any:
    """The weights of a view: `online`, `fast` or `slow`."""
    return state.params if view == "online" else getattr(state.ema, view)


def num_updates(state: TrainState) -> Array:
    """Optimizer steps done: steps less the skipped ones."""
    return state.step - state.skipped_total


def select_state(keep: Array, new: TrainState, old: TrainState) -> TrainState:
    """`new` where `keep`, else `old` with the step counted as skipped; no weight, moment or average moves then."""
    chosen = jax.tree.map(lambda n, o: jnp.where(keep, n, o), new, old)
    missed = 1 - keep.astype(jnp.int32)
    return chosen._replace(
        step=old.step + 1, skipped=(old.skipped + 1) * missed, skipped_total=old.skipped_total + missed
    )


def to_items(state: TrainState) -> dict[str, Any]:
    """The parts of a state that a checkpoint stores as separate items; the counters are not among them."""
    return {"params": state.params, "fast": state.ema.fast, "slow": state.ema.slow, "optimizer": state.opt_state}


def from_items(items: dict[str, Any], counters: dict[str, Any]) -> TrainState:
    """The inverse of `to_items`, with the scalars `step`, `skipped` and `skipped_total`."""
    ema = DualEma(items["fast"], items["slow"])
    return TrainState(params=items["params"], ema=ema, opt_state=items["optimizer"], **counters)
