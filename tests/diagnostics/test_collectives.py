import importlib.util
import subprocess
import sys

import pytest

from shortcut_jax.diagnostics.collectives import describe, explain
from shortcut_jax.errors import TargetError
from shortcut_jax.runtime.aot_targets import GPUS, target_devices
from shortcut_jax.runtime.hlo_schedule import Program, Transfer
from tests.helpers import tiny_assembly

SHAPES = {
    "single_blocks/mlp_in/kernel": (38, 3072, 12288),
    "single_blocks/attn_out/kernel": (38, 24, 128, 3072),
    "img_in/kernel": (64, 3072),
}
MESH = {"data": 8, "fsdp": 8, "tensor": 2}


def _transfer(kind, dims, name, dtype="f32", axes=("fsdp",)):
    return Transfer(kind, ((dtype, dims),), ((f"jit(f)/while/body/{name}/dot_general",),), axes, 38, True, 1, 0, 0)


@pytest.mark.parametrize(
    ("transfer", "what"),
    [
        (_transfer("all-gather", (3072, 12288), "single_blocks/mlp_in", "bf16"), "weights single_blocks/mlp_in/kernel"),
        (_transfer("all-gather", (3072, 6144), "single_blocks/mlp_in", "bf16"), "weights single_blocks/mlp_in/kernel"),
        (_transfer("reduce-scatter", (3072, 12288), "single_blocks/mlp_in"), "gradients single_blocks/mlp_in/kernel"),
        (
            _transfer("all-reduce", (384, 12288), "single_blocks/mlp_in", axes=("data",)),
            "gradients single_blocks/mlp_in/kernel",
        ),
        (
            _transfer("collective-permute", (384, 6144), "single_blocks/mlp_in"),
            "ring of gradients single_blocks/mlp_in/kernel",
        ),
        (
            _transfer("all-reduce", (16, 512, 3072), "single_blocks/attn_out", "bf16", ("tensor",)),
            "activation of single_blocks/attn_out",
        ),
        (_transfer("all-gather", (128, 512, 3072), "single_blocks", "bf16"), "activation of single_blocks"),
        (
            _transfer("all-reduce", (4718592,), "single_blocks/attn_out", axes=("data",)),
            "gradients of single_blocks/attn_out joined",
        ),
        (_transfer("all-reduce", (34048,), "anything"), "biases, norms, sums and metrics"),
        (_transfer("all-gather", (64, 3072), "params['img_in']['kernel']"), "weights img_in/kernel"),
        (_transfer("all-to-all", (128, 512, 3072), "elsewhere"), "?"),
    ],
)
def test_what_a_collective_moves(transfer, what):
    assert describe(transfer, SHAPES, MESH) == what


@pytest.mark.slow
def test_every_collective_of_a_small_step_is_explained():
    assembly = tiny_assembly(8, mesh__data=2, mesh__fsdp=4, batch_size=64)
    text = assembly.train_step.lower(assembly.state_shapes, assembly.batch_shapes()).compile().as_text()
    explanation = explain(assembly, Program(text))
    assert explanation.lines and not explanation.unexplained
    assert {line.axes for line in explanation.lines} <= {"data", "fsdp", "data x fsdp"}
    assert "fsdp" in {line.axes for line in explanation.lines if line.kind == "all-gather"}


@pytest.mark.parametrize(
    "target", ["gpu:h100:8", "gpu:h300:1x8", "gpu:h100:0x8", "tpu:v5p:4", "tpu:v9:2x2", "cpu:0", "cpu:x", "rocm:1x8"]
)
def test_targets_that_there_are_not_name_those_that_there_are(target):
    with pytest.raises(TargetError, match=r"must be cpu:N, gpu:.*h100.*NODESxGPUS or tpu:.*v5p.*XxYxZ"):
        target_devices(target)


def test_gpus_of_four_kinds_are_described():
    assert GPUS == ("a100", "b200", "h100", "h200")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the compiler is there")
def test_a_tpu_target_says_what_to_install():
    with pytest.raises(TargetError, match=r"pip install '\.\[tpu\]' \(no TPU is needed\)"):
        target_devices("tpu:v5p:2x2x2")


def _compiles(platform, only):
    argv = [sys.executable, "-m", "benchmarks.compile_pods", f"--platform={platform}", f"--only={only}"]
    done = subprocess.run([*argv, "--objectives=scfm"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| scfm | 16 |" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs .[cuda], though no GPU")
def test_the_pod_step_compiles_for_eight_h100s_and_holds_what_the_docs_say():
    _compiles("gpu", "1x8")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs .[tpu], though no TPU")
def test_the_pod_step_compiles_for_eight_v5p_chips_and_holds_what_the_docs_say():
    _compiles("tpu", "2x2x2")
