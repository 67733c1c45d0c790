"""A train step that is compiled and read, without data."""

import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from shortcut_jax.diagnostics.roofline import Efficiencies, Roofline, roofline
from shortcut_jax.run.assembly import Assembly
from shortcut_jax.run.step_memory import total_bytes
from shortcut_jax.runtime.device_table import device_spec
from shortcut_jax.runtime.hlo import compile_and_partition
from shortcut_jax.runtime.hlo_schedule import Program

UNREAD = "TPU"
"""How the kind of devices begins whose programs have no roofline yet.

XLA:TPU writes a collective into each fusion that it runs beside, and gradients as rings of matrix products: both would
count more than once.
"""


class CompiledStep(NamedTuple):
    """A train step that is compiled, and read.

    Attributes:
      assembly: its run.
      executable: (state, batch) -> (state, metrics), for the devices that it was compiled for.
      memory: XLA's account of it.
      partitioned: the text right after partitioning, where there is one.
      text: of the program that was compiled.
      program: the same, read.
      time: its roofline; None for devices without figures, and for TPUs.
      lowering: seconds.
      compiling: seconds.
    """

    assembly: Assembly
    executable: Any
    memory: Any
    partitioned: str | None
    text: str
    program: Program
    time: Roofline | None
    lowering: float
    compiling: float

    @property
    def bytes(self) -> int:
        """That a device needs."""
        return total_bytes(self.memory)

    @property
    def kind(self) -> str:
        """Of the devices."""
        return self.assembly.mesh.devices.flat[0].device_kind

    @property
    def share(self) -> tuple[float, float]:
        """Model FLOPs and rows of one device and step."""
        devices = self.assembly.mesh_shape.devices
        return self.assembly.flops() / devices, self.assembly.batch_size / devices


def random_batch(assembly: Assembly, seed: int = 0) -> Any:
    """A batch of a run whose values are noise, on its devices."""
    rng = np.random.default_rng(seed)
    draw = lambda s: jax.device_put(rng.standard_normal(s.shape, np.float32).astype(s.dtype), s.sharding)
    return jax.tree.map(draw, assembly.batch_shapes())


def compile_step(assembly: Assembly, efficiencies: Efficiencies | None = None) -> CompiledStep:
    """Compiles the step of a run; nothing runs."""
    begin = time.perf_counter()
    lowered = assembly.train_step.lower(assembly.state_shapes, assembly.batch_shapes())
    between = time.perf_counter()
    compiled, partitioned = compile_and_partition(lowered)
    seconds = between - begin, time.perf_counter() - between
    text = compiled.as_text()
    program = Program(text)
    timed = time_of(program, assembly.mesh, efficiencies)
    return CompiledStep(assembly, compiled, compiled.memory_analysis(), partitioned, text, program, timed, *seconds)


def time_of(program: Program, mesh: Mesh, efficiencies: Efficiencies | None = None) -> Roofline | None:
    """The roofline of a program; None for devices without figures, and for TPUs."""
    spec = device_spec(mesh.devices.flat[0])
    if spec is None or spec.kind.startswith(UNREAD):
        return None
    return roofline(program, mesh.shape, spec, efficiencies)
