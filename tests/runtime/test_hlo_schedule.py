import pytest

from shortcut_jax.runtime.hlo_schedule import Program, num_bytes

MESH = {"data": 2, "fsdp": 4, "tensor": 1}
FSDP = "replica_groups={{0,1,2,3},{4,5,6,7}}"

# ruff: noqa: E501  (instructions are lines)
GPU = """
HloModule jit_train_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%gemm_body (p: bf16[8,8]) -> bf16[8,8] {
  ROOT %dot.1 = bf16[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}
}

%body (carried: (s32[], bf16[2,8], f32[8,8])) -> (s32[], bf16[2,8], f32[8,8]) {
  %carried = (s32[], bf16[2,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carried), index=0
  %shard = bf16[2,8]{1,0} get-tuple-element(%carried), index=1, metadata={op_name="jit(f)/single_blocks/mlp_in/convert"}
  %before = f32[8,8]{1,0} get-tuple-element(%carried), index=2
  %ag = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%shard), channel_id=1, FSDP, dimensions={0}
  %product = bf16[8,8]{1,0} fusion(%shard), kind=kCustom, calls=%gemm_body
  %attended = bf16[8,8]{1,0} custom-call(%product), custom_call_target="__cudnn$fmhaSoftmax"
  %done = bf16[8,8]{1,0} all-gather-done(%ag)
  %rs = ((f32[8,8]{1,0}), f32[2,8]{1,0}) reduce-scatter-start(%before), channel_id=2, FSDP, dimensions={0}, to_apply=%add
  %scattered = f32[2,8]{1,0} reduce-scatter-done(%rs)
  %ar = f32[8,8]{1,0} all-reduce(%before), channel_id=3, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, to_apply=%add
  %grad = f32[8,8]{1,0} fusion(%done), kind=kLoop, calls=%add, metadata={op_name="jit(f)/single_blocks/mlp_in/dot_general"}
  ROOT %next = (s32[], bf16[2,8]{1,0}, f32[8,8]{1,0}) tuple(%i, %shard, %grad)
}

ENTRY %main (x: bf16[2,8]) -> f32[8,8] {
  %start = (s32[], bf16[2,8]{1,0}, f32[8,8]{1,0}) tuple(%zero, %x, %y)
  %loop = (s32[], bf16[2,8]{1,0}, f32[8,8]{1,0}) while(%start), condition=%less, body=%body, backend_config={"known_trip_count":{"n":"38"}}
  ROOT %out = f32[8,8]{1,0} get-tuple-element(%loop), index=2
}
""".replace("FSDP", FSDP)

TPU = """
HloModule jit_train_step, is_scheduled=true

%async_collective_fusion.1 (p: bf16[2,8]) -> bf16[8,8] {
  %mm = bf16[8,8]{1,0} convolution(%p, %p), dim_labels=bf_io->bf
  ROOT %all-gather.1 = bf16[8,8]{1,0} all-gather(%p), channel_id=7, FSDP, dimensions={0}, metadata={op_name="jit(f)/img_in/sharding_constraint"}
}

%finish (q: bf16[8,8]) -> bf16[8,8] {
  ROOT %all-gather.2 = bf16[8,8]{1,0} all-gather(%q), channel_id=7, FSDP, dimensions={0}
}

%less (c: (s32[])) -> pred[] {
  %bound = s32[]{:T(128)} constant(19)
  ROOT %compare = pred[] compare(%i, %bound), direction=LT
}

%body (c: (s32[])) -> (s32[]) {
  %a = bf16[8,8]{1,0} fusion(%w), kind=kOutput, calls=%async_collective_fusion.1
  ROOT %b = bf16[8,8]{1,0} fusion(%a), kind=kOutput, calls=%finish
}

ENTRY %main (x: bf16[2,8]) -> bf16[8,8] {
  ROOT %loop = (s32[]) while(%start), condition=%less, body=%body
}
""".replace("FSDP", FSDP)


def test_a_collective_knows_its_bytes_axes_times_and_what_runs_beside_it():
    gather, scatter, reduce = Program(GPU).transfers(MESH)
    assert (gather.kind, gather.arrays, gather.bytes) == ("all-gather", (("bf16", (8, 8)),), 128)
    assert (gather.axes, gather.times, gather.asynchronous) == (("fsdp",), 38, True)
    assert (gather.matmuls, gather.attentions, gather.others) == (1, 1, 0)
    assert gather.sources[0][0] == "jit(f)/single_blocks/mlp_in/convert"
    # Before it is scattered; nothing is between its start and its end.
    assert (scatter.kind, scatter.arrays, scatter.asynchronous) == ("reduce-scatter", (("f32", (8, 8)),), False)
    assert (reduce.axes, reduce.asynchronous, reduce.times) == (("data",), False, 38)


def test_what_a_loop_carries_is_followed_to_the_iteration_before():
    _, scatter, reduce = Program(GPU).transfers(MESH)
    for transfer in (scatter, reduce):
        assert "jit(f)/single_blocks/mlp_in/dot_general" in transfer.sources[0]


def test_a_collective_in_several_computations_counts_once_and_its_loop_by_its_condition():
    (gather,) = Program(TPU).transfers(MESH)
    assert (gather.times, gather.matmuls, gather.asynchronous, gather.axes) == (19, 1, True, ("fsdp",))
    assert gather.sources == (("jit(f)/img_in/sharding_constraint",),)


SCATTER = """
%all-reduce-scatter.2.clone (input: f32[8,8]) -> f32[2,8] {
  %input = f32[8,8]{1,0} parameter(0)
  %all-reduce.9 = f32[8,8]{1,0} all-reduce(%input), channel_id=4, FSDP, to_apply=%add
  ROOT %mine = f32[2,8]{1,0} dynamic-slice(%all-reduce.9, %offset, %zero), dynamic_slice_sizes={2,8}
}

ENTRY %main (x: f32[8,8]) -> f32[2,8] {
  %grad = f32[8,8]{1,0} fusion(%x), kind=kLoop, calls=%multiply, metadata={op_name="jit(f)/img_in/mul"}
  ROOT %shard = f32[2,8]{1,0} fusion(%grad), kind=kCustom, calls=%all-reduce-scatter.2.clone, metadata={op_name="jit(f)/img_in/dot_general"}
}
""".replace("FSDP", FSDP)


def test_an_all_reduce_of_which_a_slice_is_kept_is_a_scatter_and_moves_what_its_caller_reads():
    (scatter,) = Program(SCATTER).transfers(MESH)
    assert (scatter.kind, scatter.arrays, scatter.axes) == ("reduce-scatter", (("f32", (8, 8)),), ("fsdp",))
    assert (scatter.asynchronous, scatter.times) == (False, 1)
    assert scatter.sources == (("jit(f)/img_in/mul", "jit(f)/img_in/dot_general"),)


def test_attention_kernels_are_counted():
    assert Program(GPU).attention_kernels() == {"__cudnn$fmhaSoftmax": 1}
    assert Program(TPU).attention_kernels() == {}


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("replica_groups=[1,8]<=[8]", ("data", "fsdp")),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", ("fsdp",)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", ("data", "fsdp")),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", ("fsdp",)),
    ],
)
def test_groups_of_every_notation_are_mesh_axes(groups, axes):
    text = (
        "ENTRY %main (x: f32[8]) -> f32[8] {\n  %ar = f32[8]{0} all-reduce(%x), channel_id=1, GROUPS, to_apply=%add\n}"
    )
    (transfer,) = Program(text.replace("GROUPS", groups)).transfers(MESH)
    assert transfer.axes == axes


def test_bytes_of_every_width():
    assert [num_bytes(d, (3, 2)) for d in ("bf16", "f32", "pred", "f8e4m3fn", "s64")] == [12, 24, 6, 6, 48]
