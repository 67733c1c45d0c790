"""What sampling takes by its compiled program, for a GPU that need not be there: a row for each way of computing it.

    python -m benchmarks.sampling_roofline --target=gpu:h100:1x1 --pixels=1024 --steps=4

The network alone, with weights in bfloat16 and 512 text tokens: no text encoders and no autoencoder. Figures and shares
are those of `train --dry_run` (docs/performance.md).
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from shortcut_jax import cli
from shortcut_jax.core.latents import PATCH
from shortcut_jax.core.types import Condition
from shortcut_jax.diagnostics.compiled_step import time_of
from shortcut_jax.diagnostics.roofline import Roofline
from shortcut_jax.errors import UsageError
from shortcut_jax.models.attention import choose_backend
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.models.init import weight_shapes
from shortcut_jax.models.presets import PRESETS, preset
from shortcut_jax.run.step_memory import GB
from shortcut_jax.runtime.aot_targets import target_devices
from shortcut_jax.runtime.hlo_schedule import Program
from shortcut_jax.runtime.sharding import (
    MeshShape,
    make_constrain,
    make_mesh,
    make_per_shard,
    replicated,
    tree_shardings,
)
from shortcut_jax.steps.sampling import make_sampler

LATENT_PIXELS = 8
"""Pixels of an image along a latent's side."""


def main(argv: Sequence[str]) -> int:
    """Prints the table, a row as it is compiled."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling_roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="gpu:h100:1x1", help="devices, as for train --dry_run")
    parser.add_argument("--preset", default="flux-dev", choices=PRESETS, help="the network")
    parser.add_argument("--pixels", type=int, default=1024, help="side of an image")
    parser.add_argument("--steps", type=int, default=4, help="sampling steps")
    options = parser.parse_args(argv[1:])
    devices = target_devices(options.target)
    print("| products | guidance | images | ms | ms an image | MFU | arguments, GB | temporaries, GB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    mesh = make_mesh(MeshShape(1, len(devices), 1), devices)
    for matmul_dtype in (None, "float8"):
        network = _network(options.preset, mesh, matmul_dtype)
        for images, cfg in ((1, False), (1, True), (4, False)):
            found, memory = _sampled(network, mesh, options.pixels // LATENT_PIXELS, options.steps, images, cfg)
            ms = 1e3 * found.practical.seconds
            row = (
                matmul_dtype or "bfloat16",
                "cfg" if cfg else "none",
                images,
                f"{ms:.0f}",
                f"{ms / images:.0f}",
                f"{found.mfu(found.practical, found.flops):.1%}",
                f"{memory.argument_size_in_bytes / GB:.1f}",
                f"{memory.temp_size_in_bytes / GB:.1f}",
            )
            print(f"| {' | '.join(map(str, row))} |", flush=True)
    return 0


def _network(name: str, mesh: Mesh, matmul_dtype: str | None) -> FluxConfig:
    """A network in bfloat16, as a converted pipeline computes it."""
    cfg, dtype = preset(name), "bfloat16"
    return dataclasses.replace(
        cfg,
        compute_dtype=dtype,
        param_dtype=dtype,
        matmul_dtype=matmul_dtype,
        attention=choose_backend("auto", mesh.devices.flat[0].platform, dtype, cfg.head_size),
        constrain=make_constrain(mesh),
        per_shard=make_per_shard(mesh),
    )


def _sampled(network: FluxConfig, mesh: Mesh, side: int, steps: int, images: int, cfg: bool) -> tuple[Roofline, Any]:
    """The roofline of sampling some images, and XLA's account of the memory."""
    on_all = replicated(mesh)
    shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype, sharding=on_all)
    weights = weight_shapes(network)
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), weights, tree_shardings(mesh, weights)
    )
    noise = shape(images, (side // PATCH) ** 2, network.channels)
    guidance = shape(images) if network.guidance else None
    states = shape(images, 512, network.text_width, dtype=jnp.bfloat16), shape(images, network.pooled_width)
    condition = Condition(*states, guidance)
    sampler = make_sampler(network, (side, side), steps)

    def sample(params: Any, noise: Any, condition: Condition, other: Condition | None) -> Any:
        return sampler(params, noise, condition, steps, other, 4.0)

    with jax.set_mesh(mesh):
        compiled = jax.jit(sample).lower(placed, noise, condition, condition if cfg else None).compile()
    found = time_of(Program(compiled.as_text()), mesh)
    if found is None:
        raise UsageError(f"{mesh.devices.flat[0].device_kind} has no roofline: take --target=gpu:h100:1x1")
    return found, compiled.memory_analysis()


if __name__ == "__main__":
    cli.run(main)
