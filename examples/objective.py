# ---
# jupyter:
#   jupytext: {text_representation: {format_name: percent}}
# ---

# %% [markdown]
# # Add an objective
# An objective gives each sample of a batch an input, its time, the step size that the network is conditioned on, and a
# regression target. It is one function and one record; data, EMAs, sharding and checkpoints stay as they are.

# %%
from pathlib import Path

from shortcut_jax.config import default_config
from shortcut_jax.config.checks import from_config
from shortcut_jax.core.shortcut import scfm_target
from shortcut_jax.run.check_training import assemble_training
from shortcut_jax.steps.networks import Networks
from shortcut_jax.steps.objectives import (
    OBJECTIVES,
    Examples,
    Objective,
    ObjectiveSettings,
    Rows,
    at_jump_times,
    interval_start,
)
from shortcut_jax.training.session import train

# %% [markdown]
# SCFM with one EMA in place of two: the slow EMA makes all jumps of a student step. `rows.draws` holds the random
# numbers of the step, `networks` the velocity functions of the model, its EMAs and its teacher.


# %%
def slow_alone(rows: Rows, networks: Networks, settings: ObjectiveSettings) -> Examples:
    """The mean velocity of the slow EMA over a student step."""
    x_BNC, t_B, length_B = interval_start(rows)
    slow = at_jump_times(networks.slow(rows.condition), rows, settings)
    return Examples(x_BNC, t_B, length_B, scfm_target(x_BNC, rows.draws.intervals.times_BJ, slow, slow))


OBJECTIVES["slow_alone"] = Objective(of_self_rows=slow_alone)

# %%
config = default_config()
config.objective = "slow_alone"
config.steps = 200
config.batch_size = 128
config.mesh.data, config.mesh.fsdp = -1, 1
CHANGES: dict[str, object] = {}
config.update_from_flattened_dict(CHANGES)

train(assemble_training(from_config(config)), Path("runs/example-objective"))
