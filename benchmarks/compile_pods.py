"""Compiles the 12B pretraining step for pods that are not found, and checks what the compiled programs do.

    python -m benchmarks.compile_pods --platform=gpu       # pip install '.[cuda]', no GPU needed
    python -m benchmarks.compile_pods --platform=tpu       # pip install '.[tpu]', no TPU needed

Prints a line of a Markdown table for each mesh and objective, and fails where a program does not hold what
`docs/pods.md` says: bytes of the arguments, dtypes and kinds of the collectives, attention kernels, memory.
"""

import argparse
import math
import runpy
import sys

import jax

from shortcut_jax.config.checks import from_config
from shortcut_jax.diagnostics.collectives import SMALL, explain
from shortcut_jax.diagnostics.compiled_step import compile_step
from shortcut_jax.run.assembly import Assembly
from shortcut_jax.run.step_memory import GB, expected_temporaries
from shortcut_jax.runtime.aot_targets import target_devices

MESHES = {"FSDP": (1, -1, 1), "HSDP": (-1, 8, 1), "FSDP x TP": (-1, 4, 2)}
POINTS = {
    "gpu": [
        ("gpu:h100:1x8", 80, ("FSDP", "FSDP x TP")),
        ("gpu:h100:8x8", 80, ("FSDP", "HSDP", "FSDP x TP")),
        ("gpu:h100:32x8", 80, ("HSDP", "FSDP x TP")),
    ],
    "tpu": [("tpu:v5p:2x2x2", 95, ("FSDP",)), ("tpu:v5p:4x4x4", 95, ("HSDP",))],
}


def check(assembly, explanation, argument_bytes, total_bytes, limit_gb):
    """The first thing that is not as it has to be, or an empty string."""
    mesh = assembly.mesh_shape
    # 20 bytes a parameter of what a device holds: its shards, and what is too small to be split.
    expected = 20 * sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(assembly.network_shapes))
    expected += sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in assembly.batch_shapes())
    if abs(argument_bytes / expected - 1) > 0.01:
        return f"{argument_bytes / GB:.2f} GB of arguments, not {expected / GB:.2f}"
    if total_bytes > limit_gb * GB:
        return f"{total_bytes / GB:.1f} GB do not fit"
    if explanation.unexplained:
        return f"unexplained: {explanation.unexplained[0]}"
    on_tpu = assembly.platform == "tpu"
    # XLA:TPU hides its scatters where it makes rings of them, which on 64 chips it does not (docs/pods.md).
    moved = {k: size for k, size in explanation.moved().items() if not on_tpu or k[0] == "all-gather"}
    hidden = sum(size for (*_, beside), size in moved.items() if beside) / sum(moved.values())
    if hidden < (0.75 if on_tpu else 0.9):
        return f"only {hidden:.1%} of what is moved is hidden"
    for line in explanation.lines:
        if line.kind == "all-to-all" or (line.kind == "collective-permute" and "ring of gradients" not in line.what):
            return f"{line.kind} of {line.what}"
        if "activation" in line.what and (mesh.tensor == 1 or line.kind != "all-reduce"):
            return f"{line.kind} of {line.what}"
        if line.kind == "all-gather" and line.dtype != "bf16":
            return f"all-gather in {line.dtype} of {line.what}"
        if "gradients" in line.what and line.dtype != "f32":
            return f"{line.kind} in {line.dtype} of {line.what}"
        # Under tensor parallelism and on TPUs those of modulations and the ends may be added up whole (docs/pods.md).
        ends = "blocks/" not in line.what
        scattered = (mesh.tensor == 1 and not on_tpu) or not ("modulation" in line.what or ends)
        if line.kind == "all-reduce" and "gradients" in line.what and "fsdp" in line.axes and scattered:
            return f"gradients are not scattered: {line.what}"
    names = " ".join(explanation.attention)
    wanted = ["tpu_custom_call"] if on_tpu else ["fmhaSoftmax", "fmhaSoftmaxBackward"]
    return next((f"no attention kernel {name}" for name in wanted if name not in names), "")


def row(target, limit_gb, mesh_name, objective):
    """Compiles one point; its line of the table and what is wrong with it."""
    config = runpy.run_path("configs/flux_pretrain.py")["get_config"]()
    config.objective = objective
    config.model.remat = "full"  # what moves does not depend on it
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = MESHES[mesh_name]
    assembly = Assembly(from_config(config), target_devices(target))
    step = compile_step(assembly)
    explanation = explain(assembly, step.program)
    arguments, temporaries = step.memory.argument_size_in_bytes, step.memory.temp_size_in_bytes
    wrong = check(assembly, explanation, arguments, step.bytes, limit_gb)
    totals = {}
    for (kind, _, axes, hidden), size in explanation.moved().items():
        if size >= SMALL:
            kept = totals.setdefault((kind, axes), [0, 0])
            kept[0] += size
            kept[1] += size * hidden
    moved = "; ".join(
        f"{kind} over {axes} {size / GB:.0f} ({100 * hidden / size:.0f}%)"
        for (kind, axes), (size, hidden) in sorted(totals.items(), key=lambda item: -item[1][0])
        if size >= GB / 2
    )
    cells = (
        target,
        f"{mesh_name}: {assembly.mesh_shape}",
        objective,
        f"{assembly.batch_size / assembly.mesh_shape.devices:g}",
        f"{arguments / GB:.2f}",
        f"{temporaries / GB:.2f} ({sum(expected_temporaries(assembly).values()) / GB:.2f})",
        moved,
        f"{step.lowering + step.compiling:.0f} s",
    )
    return "| " + " | ".join(cells) + " |", wrong


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--platform", choices=POINTS, required=True)
    parser.add_argument("--only", default="", help="only targets that contain this")
    parser.add_argument("--objectives", default="flow,scfm")
    options = parser.parse_args()
    failed = 0
    print(
        "| target | mesh | objective | rows per device | arguments, GB | temporaries (by arithmetic), GB | "
        "GB moved per step (share overlapped with compute) | compiled in |"
    )
    print("|" + " --- |" * 8, flush=True)
    for target, limit_gb, meshes in POINTS[options.platform]:
        for mesh in meshes if options.only in target else ():
            for objective in options.objectives.split(","):
                line, wrong = row(target, limit_gb, mesh, objective)
                print(line, flush=True)
                failed += bool(wrong)
                if wrong:
                    print(f"{target} {mesh} {objective}: {wrong}", file=sys.stderr, flush=True)
                jax.clear_caches()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
