"""The roofline of a step: two streams, known times, what it says."""

import pytest

from shortcut_jax.diagnostics.roofline import (
    IDEAL,
    Efficiencies,
    Time,
    parse_efficiencies,
    roofline,
    schedule,
    seconds,
    summary,
    tables,
)
from shortcut_jax.errors import UsageError
from shortcut_jax.runtime.device_table import DEVICES, DeviceSpec
from shortcut_jax.runtime.hlo_costs import Kernel
from shortcut_jax.runtime.hlo_schedule import Program
from tests.runtime.test_hlo_costs import MESH, PROGRAM

DEVICE = DeviceSpec(
    "test", {"bf16": 1e6, "f8": 2e6, "tf32": 5e5, "f32": 1e5}, capacity=1e9, memory=1e6, inside=1e5, across=1e4, node=4
)
WORK = lambda name, time: Kernel(name, "elementwise", bytes=time)
SEND = lambda name, time, later=True: Kernel(name, "all-gather", wire=time, asynchronous=later)
WAIT = lambda name: Kernel(f"{name}-done", "wait", waits_for=name)


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        ([WORK("a", 2), WORK("b", 3)], Time(5, {})),
        ([SEND("g", 4, later=False), WORK("a", 2)], Time(6, {"g": 4})),
        ([SEND("g", 4), WORK("a", 5), WAIT("g")], Time(5, {})),  # hidden
        ([SEND("g", 4), WORK("a", 1), WAIT("g"), WORK("b", 2)], Time(6, {"g": 3})),  # partly
        # The second collective begins after the first.
        ([SEND("g", 4), SEND("h", 3), WORK("a", 5), WAIT("g"), WAIT("h")], Time(7, {"h": 2})),
        ([WORK("a", 1), SEND("g", 4)], Time(5, {})),  # nothing waits, but the step is not done before
    ],
)
def test_two_streams(kernels, expected):
    assert schedule(kernels, lambda k: k.bytes, lambda k: k.wire) == expected


@pytest.mark.parametrize(
    ("kernel", "ideal", "practical"),
    [
        (Kernel("k", "gemm", "bf16", flops=1e6, bytes=10), 1.0, 1 / 0.72),
        (Kernel("k", "gemm", "f8e4m3fn", flops=1e6), 0.5, 0.5 / 0.72),
        (Kernel("k", "gemm", "f32", flops=1e6), 10.0, 10 / 0.72),
        (Kernel("k", "attention backward", "bf16", flops=1e6), 1.0, 1 / 0.45),
        (Kernel("k", "gemm", "bf16", flops=1e6, bytes=2e6), 2.0, 2 / 0.85),  # memory takes longer
        (Kernel("k", "elementwise", bytes=1e6), 1.0, 1 / 0.85),
    ],
)
def test_a_kernel_takes_the_longer_of_its_flops_and_its_bytes(kernel, ideal, practical):
    assert seconds(kernel, DEVICE, IDEAL) == pytest.approx(ideal)
    assert seconds(kernel, DEVICE, Efficiencies()) == pytest.approx(practical)


def test_a_program_s_time_is_that_of_its_blocks_as_often_as_they_run():
    found = roofline(Program(PROGRAM), MESH, DEVICE)
    # The group spans two nodes of four devices: both collectives go over the slow links.
    assert found.wires["all-reduce", "fsdp"] == pytest.approx((448.0, 448 / 1e4 / 0.8, 448 / 1e4 / 0.8))
    gather = found.wires["all-gather", "fsdp"]
    assert gather[:2] == pytest.approx((10 * 896.0, 10 * 896 / 1e4 / 0.8))
    assert found.work["forward", "gemm bf16"].launches == 10
    assert found.work["forward", "gemm bf16"].flops == 10 * 2 * 4 * 16 * 32
    assert found.copied == 10 * 516 and found.rematerialised == 0
    # A gather takes longer than all else of a run of the loop: it is waited for but for the product beside it.
    product = max(4096 / 1e6, 1408 / 1e6)
    assert gather.waited == pytest.approx(gather.seconds - 10 * max(4096 / 0.72e6, 1408 / 0.85e6), rel=1e-6)
    assert found.ideal.waiting == pytest.approx(448 / 1e4 + 10 * (896 / 1e4 - product), rel=1e-6)
    assert found.ideal.seconds < found.practical.seconds
    inside = roofline(Program(PROGRAM), MESH, DEVICE._replace(node=8))
    assert inside.wires["all-reduce", "fsdp"].seconds == pytest.approx(448 / 1e5 / 0.8)


def test_what_is_told_is_of_the_model_s_flops_and_the_rows_of_a_device():
    found = roofline(Program(PROGRAM), MESH, DEVICE)
    told = dict(summary(found, model_flops=found.flops / 1.25, rows=4))
    time = found.practical.seconds
    assert told["step time"].startswith(
        f"{1e3 * time:.4g} ms, MFU {found.flops / 1.25 / time / 1e6:.1%}, {4 / time:.3g} "
    )
    assert told["  executed"] == "1.250 x the model FLOPs" and "  rematerialised" not in told
    text = tables(found, parameters=64)
    assert "| forward" in text and "| all-gather | fsdp |" in " ".join(text.split()) and "bytes a parameter" in text


def test_efficiencies_are_given_by_name():
    assert parse_efficiencies(["gemm=0.6", "network=.5"]) == Efficiencies(gemm=0.6, network=0.5)
    for bad in ("gem=0.6", "gemm=2", "gemm=0", "gemm", "gemm=-1", "gemm=nan"):
        with pytest.raises(UsageError, match="must be NAME=SHARE of attention_backward, attention_forward, gemm"):
            parse_efficiencies([bad])


@pytest.mark.parametrize("spec", DEVICES, ids=lambda spec: spec.kind)
def test_every_device_has_plausible_figures(spec):
    assert 1e14 < spec.peak("bf16") < 1e16 and spec.peak("f32") <= spec.peak("bf16") <= spec.peak("f8e4m3fn")
    assert spec.peak("f16") == spec.peak("bf16") and 5e11 < spec.memory < 2e13
    assert (spec.across or 0) < spec.inside < spec.memory
