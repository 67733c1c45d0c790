"""Memory of a train step: by arithmetic, by its compiled program, and the rematerialisation that fits into it."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from shortcut_jax.cluster import key_value
from shortcut_jax.cluster.distributed import agree, say
from shortcut_jax.core.tree import flat_paths
from shortcut_jax.models.flux import is_float8
from shortcut_jax.run.assembly import Assembly
from shortcut_jax.runtime.device_table import usable_memory
from shortcut_jax.runtime.sharding import local_bytes, own_device

GB = 1e9

AUTO_POLICIES = ("none", "branch_mlp", "branch", "full")
"""What `model.remat=auto` chooses from: each computes more again, and keeps less, than the one before it.

`selective` and `dots` take more time than `branch` and more memory (docs/performance.md).
"""

FILLED = 0.95
"""Share of the usable memory that a step may need: the rest is for what the allocator cannot place, and for batches."""


class Needs(NamedTuple):
    """What a compiled step needs of a device.

    Attributes:
      bytes: arguments and temporaries.
      made_again: instructions that XLA computes again by itself, to save memory.
    """

    bytes: int
    made_again: int


def needs_of(memory: Any, text: str) -> Needs:
    """From XLA's account of a program's memory, and its text."""
    made_again = len(re.findall(r"^\s*(?:ROOT )?%?[\w.-]+\.remat[\w.]* = ", text, re.MULTILINE))
    return Needs(total_bytes(memory), made_again)


def total_bytes(memory: Any) -> int:
    """Arguments and temporaries of a program, by XLA's account of its memory."""
    return int(memory.argument_size_in_bytes + memory.temp_size_in_bytes)


def compiled_needs(assembly: Assembly) -> Needs:
    """Compiles a step to find out."""
    compiled = assembly.train_step.lower(assembly.state_shapes, assembly.batch_shapes()).compile()
    return needs_of(compiled.memory_analysis(), compiled.as_text())


def choose_remat(
    assembly: Assembly, limit: float | None = None, needs: Callable[[Assembly], Needs] = compiled_needs
) -> Assembly:
    """The run with the policy in place of `auto` that computes least again and fits; says what each one needs.

    All processes choose the same one. Where none fits, that is said and `full` is taken, which needs least.

    Args:
      assembly: with any policy; one with another than `auto` is returned as it is.
      limit: bytes of a device that may be used; what JAX may take of it (see `usable_memory`) by default.
      needs: compiles the step of an assembly.
    """
    if assembly.settings.model.remat != "auto":
        return assembly
    devices = list(assembly.mesh.devices.flat)
    usable = usable_memory(own_device(assembly.mesh)) if limit is None else limit
    if usable is None:
        say("note: model.remat=auto: the memory of a device is not known; taking full")
        return _with(assembly, "full", devices)
    most = FILLED * _least_of_all(usable)
    for policy in AUTO_POLICIES:
        chosen = _with(assembly, policy, devices)
        least = local_bytes(chosen.state_shapes) + sum(expected_temporaries(chosen).values())
        if least > most:
            say(f"model.remat=auto: remat={policy} needs at least {least / GB:.1f} GB of {most / GB:.1f} GB a device")
            continue
        found = needs(chosen)
        again = f", and XLA computes {found.made_again} results again by itself" if found.made_again else ""
        say(f"model.remat=auto: remat={policy} needs {found.bytes / GB:.1f} GB of {most / GB:.1f} GB a device{again}")
        if agree(found.bytes <= most and not found.made_again):  # programs of other hosts may differ by a little
            return chosen
    say("note: model.remat=auto: no policy fits the memory of a device; taking full, which needs least")
    return chosen


def _with(assembly: Assembly, policy: str, devices: Sequence[Any]) -> Assembly:
    s = assembly.settings
    return Assembly(dataclasses.replace(s, model=dataclasses.replace(s.model, remat=policy)), devices)


def _least_of_all(limit: float) -> float:
    """The smallest limit of all processes."""
    if key_value.num_processes() == 1:
        return limit
    return min(float(text) for text in key_value.gather("the memory of a device", repr(limit)).values())


def expected_temporaries(assembly: Assembly) -> dict[str, float]:
    """Bytes of a device that a step needs beside its arguments, by arithmetic: what has to be there at least.

    Residuals are those that the rematerialisation policy keeps for the backward pass; of `none`, which leaves the
    choice to the compiler, the operands of every matrix product and of attention.
    """
    cfg, s, mesh = assembly.model, assembly.settings, assembly.mesh_shape
    item = jnp.dtype(cfg.compute_dtype).itemsize
    flat = flat_paths(assembly.network_shapes)
    size = lambda path: 1 if cfg.matmul_dtype and is_float8(path) else item
    slices = {p: math.prod(x.shape[1:]) * size(p) for p, x in flat.items() if "_blocks/" in p}
    block = max(sum(n for p, n in slices.items() if p.startswith(f"{stack}_blocks/")) for stack in ("double", "single"))
    tokens = assembly.num_image_tokens + s.data.text_tokens
    rows = assembly.batch_size / s.accumulate / mesh.batch_shards
    inputs, attention, hidden = cfg.width, cfg.width / mesh.tensor, cfg.hidden / mesh.tensor
    blocks = cfg.double_blocks + cfg.single_blocks
    branches = inputs * (2 * cfg.double_blocks + cfg.single_blocks) / blocks
    kept = {
        "none": 5 * inputs + 5 * attention + 2 * hidden,
        "full": inputs,
        "branch": inputs + branches,
        "branch_mlp": inputs + branches + hidden,
        "selective": inputs + attention + hidden,
        "dots": 3 * inputs + 3 * attention + hidden,
    }
    trained = assembly.state_shapes.params
    return {
        "gradients": local_bytes(trained) * (1 if s.accumulate == 1 else 2),
        "a gathered block": block / mesh.tensor,
        "kept residuals": kept[cfg.remat] * blocks * tokens * rows * item,
    }
