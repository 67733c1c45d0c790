"""Costs of kernels, on small programs with known answers."""

import pytest

from shortcut_jax.runtime.hlo_costs import blocks, passes
from shortcut_jax.runtime.hlo_schedule import Program

# ruff: noqa: E501  (instructions are lines)
MESH = {"data": 1, "fsdp": 8, "tensor": 1}
GROUPS = "replica_groups=[1,8]<=[8]"

PROGRAM = """
HloModule jit_train_step, is_scheduled=true

%product (a: bf16[4,16], b: bf16[16,32]) -> bf16[4,32] {
  %a = bf16[4,16]{1,0} parameter(0)
  %b = bf16[16,32]{1,0} parameter(1)
  ROOT %dot.1 = bf16[4,32]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%layer (stack: f32[10,16,32], at: s32[]) -> bf16[16,32] {
  %stack = f32[10,16,32]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %taken = f32[1,16,32]{2,1,0} dynamic-slice(%stack, %at, %zero, %zero), dynamic_slice_sizes={1,16,32}
  %flat = f32[16,32]{1,0} bitcast(%taken)
  ROOT %narrow = bf16[16,32]{1,0} convert(%flat)
}

%stacked (kept: bf16[10,4,32], new: bf16[4,32], to: s32[]) -> bf16[10,4,32] {
  %kept = bf16[10,4,32]{2,1,0} parameter(0)
  %new = bf16[4,32]{1,0} parameter(1)
  %to = s32[] parameter(2)
  %row = bf16[1,4,32]{2,1,0} bitcast(%new)
  ROOT %put = bf16[10,4,32]{2,1,0} dynamic-update-slice(%kept, %row, %to, %zero, %zero)
}

%norm (x: bf16[4,32]) -> f32[4] {
  %x = bf16[4,32]{1,0} parameter(0)
  %wide = f32[4,32]{1,0} convert(%x)
  %square = f32[4,32]{1,0} multiply(%wide, %wide)
  ROOT %sum = f32[4]{0} reduce(%square, %zero), dimensions={1}, to_apply=%add
}

%body (carried: (s32[], f32[10,16,32], bf16[10,4,32])) -> (s32[], f32[10,16,32], bf16[10,4,32]) {
  %carried = (s32[], f32[10,16,32]{2,1,0}, bf16[10,4,32]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carried), index=0
  %weights = f32[10,16,32]{2,1,0} get-tuple-element(%carried), index=1
  %residuals = bf16[10,4,32]{2,1,0} get-tuple-element(%carried), index=2
  %x0 = bf16[4,16]{1,0} constant({...})
  %w = bf16[16,32]{1,0} fusion(%weights, %i), kind=kLoop, calls=%layer
  %ag = (bf16[2,32]{1,0}, bf16[16,32]{1,0}) all-gather-start(%shard), channel_id=1, GROUPS, dimensions={0}
  %y = bf16[4,32]{1,0} fusion(%x0, %w), kind=kCustom, calls=%product, metadata={op_name="jit(f)/jvp(Flux)/single_blocks/mlp_in/dot_general"}
  %done = bf16[16,32]{1,0} all-gather-done(%ag)
  %n = f32[4]{0} fusion(%y), kind=kInput, calls=%norm
  %out = bf16[10,4,32]{2,1,0} fusion(%residuals, %y, %i), kind=kLoop, calls=%stacked
  ROOT %next = (s32[], f32[10,16,32]{2,1,0}, bf16[10,4,32]{2,1,0}) tuple(%i, %weights, %out)
}

ENTRY %main (q: bf16[2,64,4,16], grad: f32[64]) -> f32[64] {
  %q = bf16[2,64,4,16]{3,2,1,0} parameter(0)
  %grad = f32[64]{0} parameter(1)
  %loop = (s32[], f32[10,16,32]{2,1,0}, bf16[10,4,32]{2,1,0}) while(%start), condition=%less, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  %attended = (bf16[2,64,4,16]{3,2,1,0}, u8[100]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax"
  %library = (bf16[4,32]{1,0}, u8[7]{0}) custom-call(%x1, %w1), custom_call_target="__cublas$gemm", backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}
  %x1 = f8e4m3fn[4,16]{1,0} parameter(2)
  %w1 = f8e4m3fn[16,32]{1,0} parameter(3)
  %conv = f32[4,32]{1,0} convolution(%xf, %wf), dim_labels=bf_io->bf, algorithm=dot_tf32_tf32_f32
  %xf = f32[4,16]{1,0} parameter(4)
  %wf = f32[16,32]{1,0} parameter(5)
  ROOT %reduced = f32[64]{0} all-reduce(%grad), channel_id=2, GROUPS, to_apply=%add
}
""".replace("GROUPS", GROUPS)


@pytest.fixture(scope="module")
def found():
    return blocks(Program(PROGRAM), MESH)


@pytest.fixture(scope="module")
def kernels(found):
    return {kernel.name: kernel for block in found for kernel in block.kernels}


def test_a_loop_runs_as_often_as_it_says_and_is_of_the_pass_of_its_kernels(found):
    assert [(block.name, block.times, block.looped) for block in found] == [("main", 1, False), ("body", 10, True)]
    assert [set(passes(block)) for block in found] == [{"update"}, {"forward"}]


@pytest.mark.parametrize(
    ("name", "kind", "dtype", "flops"),
    [
        ("y", "gemm", "bf16", 2 * 4 * 16 * 32),
        ("library", "gemm", "f8e4m3fn", 2 * 4 * 16 * 32),
        ("conv", "gemm", "tf32", 2 * 4 * 16 * 32),
        ("attended", "attention forward", "bf16", 4 * 2 * 4 * 64 * 64 * 16),
        ("w", "convert", "", 0),
        ("n", "reduction", "", 0),
        ("out", "copy", "", 0),
    ],
)
def test_what_a_kernel_is_and_computes(name, kind, dtype, flops, kernels):
    kernel = kernels[name]
    assert (kernel.kind, kernel.dtype, kernel.flops) == (kind, dtype, flops)


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("y", 2 * (4 * 16 + 16 * 32 + 4 * 32)),
        ("w", 4 + 4 * 16 * 32 + 2 * 16 * 32),  # the index, the layer of the stack, and its copy
        ("out", 4 + 2 * 4 * 32 + 2 * 4 * 32),  # the index, what is put in, and where
        ("n", 2 * 4 * 32 + 4 * 4),
        ("attended", 4 * 2 * 2 * 64 * 4 * 16),  # q, k, v and the result, not the scratch
        ("conv", 4 * (4 * 16 + 16 * 32 + 4 * 32)),
    ],
)
def test_a_slice_counts_as_what_is_taken_and_an_update_as_what_is_put_in(name, moved, kernels):
    assert kernels[name].bytes == moved


def test_a_collective_sends_its_share_and_is_waited_for_where_the_schedule_does(found, kernels):
    gather, reduce = kernels["ag"], kernels["reduced"]
    assert (gather.wire, gather.axes, gather.span, gather.asynchronous) == (2 * 16 * 32 * 7 / 8, ("fsdp",), 7, True)
    assert (reduce.wire, reduce.asynchronous) == (4 * 64 * 7 / 8 * 2, False)
    names = [kernel.name for kernel in found[1].kernels]
    assert names == ["w", "ag", "y", "done", "n", "out"]
    assert kernels["done"].kind == "wait" and kernels["done"].waits_for == "ag"


@pytest.mark.parametrize(
    ("line", "products"),
    [
        # A product of [16, 512, 3072] and [3072, 3, 24, 128], whose axes 3 and 24 are windows of padding but for one value.
        (
            "%y = bf16[16,512,3,24,128]{4,1,3,0,2} convolution(%x, %w), window={size=3x1x24 pad=2_2x0_0x23_23 rhs_reversal=1x0x1}, dim_labels=1bf02_i02o1->1b02f",
            16 * 512 * 3072 * 3 * 24 * 128,
        ),
        # A stride of 2 over 5 values with a window of 3 and padding of 1: 2 + 3 + 2 values.
        (
            "%y = f32[1,3,7]{2,1,0} convolution(%a, %b), window={size=3 stride=2 pad=1_1}, dim_labels=b0f_0io->b0f",
            7 * 2 * 7,
        ),
        # Every second value is a zero between two.
        (
            "%y = f32[1,9,7]{2,1,0} convolution(%a, %c), window={size=1 lhs_dilate=2}, dim_labels=b0f_0io->b0f",
            5 * 2 * 7,
        ),
    ],
)
def test_a_convolution_counts_the_values_that_its_window_holds(line, products):
    program = f"""
HloModule step, is_scheduled=true

ENTRY %main (x: bf16[16,512,3072,1,1]) -> f32[] {{
  %x = bf16[16,512,3072,1,1]{{4,3,2,1,0}} parameter(0)
  %w = bf16[3072,3,24,128,1]{{4,3,2,1,0}} parameter(1)
  %a = f32[1,5,2]{{2,1,0}} parameter(2)
  %b = f32[3,2,7]{{2,1,0}} parameter(3)
  %c = f32[1,2,7]{{2,1,0}} parameter(4)
  ROOT {line}
}}
"""
    ((kernel,),) = (block.kernels for block in blocks(Program(program), MESH))
    assert kernel.flops == 2 * products
