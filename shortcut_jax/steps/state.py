"""The train state: everything a step reads and writes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shortcut_jax.core.ema import DualEma, init_ema
from shortcut_jax.core.loss_spikes import SpikeMemory, init_spikes
from shortcut_jax.core.types import Array
from shortcut_jax.steps.networks import TEACHER, Frozen, Weights, bind_adapters, teacher_weights


class TrainState(NamedTuple):
    """One pytree, donated to each step.

    Attributes:
      step: training steps done, skipped ones included (int32).
      params: what is trained: the online weights, or the online adapters of a frozen base.
      ema: fast and slow EMA of it, float32.
      opt_state: optax state.
      skipped: skipped steps in a row, up to now (int32).
      skipped_total: skipped steps in all (int32).
      spikes: of the rule that tells spikes.
      frozen: what no step changes: base and teacher. It passes through each step and is in no checkpoint.
    """

    step: Array
    params: Any
    ema: DualEma
    opt_state: Any
    skipped: Array
    skipped_total: Array
    spikes: SpikeMemory
    frozen: Frozen


COUNTERS = ("step", "skipped", "skipped_total")


def init_state(params: Any, optimizer: optax.GradientTransformation, frozen: Frozen) -> TrainState:
    """The state before the first step: both EMAs are copies of what is trained."""
    zero = lambda: jnp.zeros((), jnp.int32)
    opt_state = optimizer.init(params)
    return TrainState(zero(), params, init_ema(params), opt_state, zero(), zero(), init_spikes(), frozen)


def choose_view(state: TrainState, view: str) -> Weights:
    """The network of a view: `online`, `fast`, `slow`, or `teacher` where there is one."""
    if view == TEACHER:
        return teacher_weights(state.frozen)
    return bind_adapters(state.params if view == "online" else getattr(state.ema, view), state.frozen)


def num_updates(state: TrainState) -> Array:
    """Optimizer steps done: steps less the skipped ones."""
    return state.step - state.skipped_total


def select_state(keep: Array, new: TrainState, old: TrainState) -> TrainState:
    """`new` where `keep`, else `old` with the step counted as skipped; no weight, moment or EMA moves then."""
    empty = Frozen()
    select = lambda n, o: jnp.where(keep, n, o)
    chosen = jax.tree.map(select, new._replace(frozen=empty), old._replace(frozen=empty))
    missed = 1 - keep.astype(jnp.int32)
    return chosen._replace(
        step=old.step + 1,
        skipped=(old.skipped + 1) * missed,
        skipped_total=old.skipped_total + missed,
        frozen=old.frozen,
    )


def count_spike(state: TrainState, spike: Array) -> TrainState:
    """The state with one more spike counted, if it is one."""
    spikes = state.spikes.spikes + spike.astype(jnp.int32)
    return state._replace(spikes=state.spikes._replace(spikes=spikes))


def to_items(state: TrainState) -> dict[str, Any]:
    """The parts of a state that a checkpoint stores as separate items; the counters are not among them."""
    return {"params": state.params, "fast": state.ema.fast, "slow": state.ema.slow, "optimizer": state.opt_state}


def to_counters(state: TrainState) -> dict[str, Any]:
    """The counters and the memory of the rule for spikes, for JSON; exact, since JSON's numbers hold float32.

    That memory is left out where the rule never was on.
    """
    counters: dict[str, Any] = {name: int(getattr(state, name)) for name in COUNTERS}
    if int(state.spikes.seen):
        counters["spikes"] = {name: np.asarray(value).tolist() for name, value in state.spikes._asdict().items()}
    return counters


def from_items(
    items: dict[str, Any],
    counters: dict[str, Any],
    frozen: Frozen,
    place: Callable[[np.ndarray], Array] = jnp.asarray,
) -> TrainState:
    """The inverse of `to_items` and `to_counters`; where no memory of spikes is stored, their rule was off.

    Args:
      items: see `to_items`.
      counters: see `to_counters`.
      frozen: what is in no checkpoint.
      place: puts a scalar on the devices.
    """
    fresh = init_spikes()._asdict()
    spikes = counters.get("spikes") or fresh
    return TrainState(
        params=items["params"],
        ema=DualEma(items["fast"], items["slow"]),
        opt_state=items["optimizer"],
        spikes=SpikeMemory(*(place(np.asarray(spikes[name], value.dtype)) for name, value in fresh.items())),
        frozen=frozen,
        **{name: place(np.asarray(counters[name], np.int32)) for name in COUNTERS},
    )
