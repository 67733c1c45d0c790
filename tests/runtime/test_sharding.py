import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from shortcut_jax.core.tree import flat_paths
from shortcut_jax.diagnostics.compiled_step import random_batch
from shortcut_jax.models.clip import ClipConfig, ClipPairConfig
from shortcut_jax.models.inception import InceptionConfig
from shortcut_jax.models.presets import PRESETS
from shortcut_jax.models.t5 import T5Config
from shortcut_jax.models.vae import VaeConfig
from shortcut_jax.runtime.hlo import collectives, count_kinds
from shortcut_jax.runtime.sharding import (
    MeshShape,
    batch_sharding,
    describe_shardings,
    fit_spec,
    leaf_spec,
    make_constrain,
    make_mesh,
    make_per_shard,
    process_rows,
    summarise_shardings,
    to_global,
    tree_shardings,
)
from shortcut_jax.sources.models import KINDS, abstract_params
from tests.helpers import (
    BOTH_BLOCKS,
    POST_TRAINING,
    host_copy,
    noisy_state,
    partitioned_hlo,
    relative,
    tiny_assembly,
)

KINDS_OF_TRAINING = {
    "from scratch": BOTH_BLOCKS,
    "adapters": BOTH_BLOCKS | POST_TRAINING | {"teacher_lora": "given", "guidance_mode": "cfg", "guidance": (1.0, 4.0)},
    "all weights": POST_TRAINING | {"train": "all"},
}


def _on(mesh, **changes):
    data, fsdp, tensor = mesh
    count = data * fsdp * tensor
    return tiny_assembly(count, mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor, **changes)


def _three_steps(assembly):
    """What three steps make of a noisy state: its items and metrics, and those after the first step."""
    state, first = noisy_state(assembly), None
    for seed in range(3):
        state, metrics = assembly.train_step(state, random_batch(assembly, seed))
        first = first or (host_copy(state.opt_state), float(metrics["loss"]))
    return state, metrics, first


def _gradients(opt_state):
    """The gradients of the first step, whose first moments are (1 - b1) times them."""
    return {path: value for path, value in flat_paths(opt_state).items() if "/mu/" in path}


def _assert_equals_one_device(kind):
    """Loss and gradients of the first step, then weights, EMAs and loss of the third; returns the sharded state.

    On a mesh that has all axes.
    """
    assembly = _on((1, 1, 1), **KINDS_OF_TRAINING[kind])
    begin = host_copy(noisy_state(assembly).params)
    state, metrics, (opt_state, loss) = host_copy(_three_steps(assembly))
    sharded, sharded_metrics, (sharded_opt_state, sharded_loss) = _three_steps(
        _on((2, 2, 2), **KINDS_OF_TRAINING[kind])
    )
    assert abs(sharded_loss - loss) <= 1e-5 * abs(loss)
    gradients, sharded_gradients = _gradients(opt_state), _gradients(sharded_opt_state)
    assert len(gradients) == len(jax.tree.leaves(state.params))
    assert relative(sharded_gradients, gradients) <= 1e-5
    assert relative(sharded.params, state.params) <= 1e-5
    assert relative(sharded.ema.fast, state.ema.fast) <= 1e-5
    assert relative(sharded.ema.slow, state.ema.slow) <= 1e-5
    for name in ("loss", "loss/teacher"):
        if name in metrics:
            assert abs(float(sharded_metrics[name]) - float(metrics[name])) <= 1e-4 * float(metrics["loss"])
    # Not vacuous: the steps moved the weights far beyond the tolerance.
    assert relative(state.params, begin) > 1e-2
    return sharded


def _shards(tree, path):
    leaf = flat_paths(tree)[path]
    return leaf.sharding.shard_shape(leaf.shape)


@pytest.mark.slow
def test_eight_devices_equal_one(highest_precision):
    sharded = _assert_equals_one_device("from scratch")
    assert _shards(sharded.params, "single_blocks/mlp_in/kernel")[1:] == (32 // 2, 128 // 2)


@pytest.mark.slow
def test_eight_devices_equal_one_with_adapters_that_a_guided_lora_teaches(highest_precision):
    sharded = _assert_equals_one_device("adapters")
    # Base and adapters are split: heads and MLP width over tensor, the other large axis over fsdp.
    fsdp = tensor = 2
    assert _shards(sharded.frozen.base, "single_blocks/mlp_in/kernel")[1:] == (32 // fsdp, 128 // tensor)
    assert _shards(sharded.params, "single_blocks/mlp_in/a")[1:] == (32 // fsdp, 3)
    assert _shards(sharded.params, "single_blocks/mlp_in/b")[1:] == (3, 128 // tensor)
    assert _shards(sharded.ema.slow, "double_blocks/img_attn/qkv/b")[1:] == (3, 3, 2 // tensor, 16)


@pytest.mark.slow
def test_eight_devices_equal_one_with_all_weights_that_a_teacher_teaches(highest_precision):
    _assert_equals_one_device("all weights")


@pytest.mark.parametrize("kind", ["from scratch", "adapters"])
def test_a_run_starts_the_same_on_any_mesh(kind):
    one, eight = (_on(mesh, **KINDS_OF_TRAINING[kind]).init_state() for mesh in ((1, 1, 1), (2, 2, 2)))
    for path, value in flat_paths(jax.device_get(one)).items():
        np.testing.assert_allclose(flat_paths(eight)[path], value, rtol=1e-6, err_msg=path)


def _partitioned(mesh, **changes):
    assembly = _on(mesh, **changes)
    return assembly, partitioned_hlo(assembly.train_step.lower(assembly.state_shapes, assembly.batch_shapes()))


def _kernel_shapes(assembly):
    """Shapes in which weights may be gathered: one block's slice, or an end."""
    flat = flat_paths(assembly.state_shapes.params)
    return {v.shape[1:] if "_blocks/" in k else v.shape for k, v in flat.items()}


@pytest.mark.slow
def test_row_split_and_accumulation_move_no_activation_under_data_parallelism():
    _, hlo = _partitioned((8, 1, 1), batch_size=64, accumulate=2)
    assert set(count_kinds(hlo)) == {"all-reduce"}


@pytest.mark.slow
def test_row_split_and_accumulation_move_no_activation_under_fsdp():
    assembly, hlo = _partitioned((2, 4, 1), batch_size=64, accumulate=2)
    assert set(count_kinds(hlo)) <= {"all-reduce", "all-gather", "reduce-scatter"}
    gathered = [c for c in collectives(hlo) if c.kind == "all-gather"]
    assert gathered
    for c in gathered:
        assert {shape for _, shape in c.arrays} <= _kernel_shapes(assembly), c.line


@pytest.fixture(scope="module")
def full_fsdp():
    # A batch size that is no other dimension of the model.
    dtypes = dict(model__compute_dtype="bfloat16", grad_reduce_dtype="float32")
    return _partitioned((1, 8, 1), **BOTH_BLOCKS, batch_size=96, **dtypes)


@pytest.mark.slow
def test_no_collective_has_the_global_batch_in_its_shape_under_full_fsdp(full_fsdp):
    assembly, hlo = full_fsdp
    found = collectives(hlo)
    assert any(c.kind == "all-gather" for c in found)
    for c in found:
        assert all(96 not in shape for _, shape in c.arrays), c.line
    assert all(96 not in shape for shape in _kernel_shapes(assembly))


@pytest.mark.slow
def test_weights_are_gathered_in_the_compute_dtype_and_gradients_reduced_in_theirs(full_fsdp):
    assembly, hlo = full_fsdp
    found = collectives(hlo)
    kernels = {s for s in _kernel_shapes(assembly) if len(s) > 1}
    gathered = {dtype for c in found if c.kind == "all-gather" for dtype, shape in c.arrays if shape in kernels}
    assert gathered == {"bf16"}
    reduced = {dtype for c in found if c.kind == "all-reduce" for dtype, shape in c.arrays if shape in kernels}
    assert reduced == {"f32"}


@pytest.mark.slow
def test_tensor_parallel_blocks_only_reduce_but_for_the_stored_halves_of_a_modulation():
    assembly, hlo = _partitioned((1, 1, 2), **BOTH_BLOCKS)
    inside = [c for c in collectives(hlo) if "_blocks/" in c.line]
    assert {c.kind for c in inside} == {"all-reduce", "all-gather"}
    flat = flat_paths(assembly.state_shapes.params)
    modulations = {v.shape[1:] for k, v in flat.items() if k.endswith("modulation/linear/kernel")}
    assert {shape for c in inside if c.kind == "all-gather" for _, shape in c.arrays} <= modulations
    assert not {"all-to-all", "collective-permute"} & set(count_kinds(hlo))


@pytest.mark.slow
def test_mixed_rows_move_no_activation_between_devices():
    assembly, hlo = _partitioned((1, 8, 1), batch_size=96, **POST_TRAINING, model__compute_dtype="bfloat16")
    found = collectives(hlo)
    assert set(count_kinds(hlo)) <= {"all-reduce", "all-gather", "reduce-scatter"}
    for c in found:
        assert all(96 not in shape for _, shape in c.arrays), c.line
    base = flat_paths(assembly.state_shapes.frozen.base)
    kernels = {v.shape[1:] for k, v in base.items() if "_blocks/" in k and k.endswith("/kernel")}
    gathered = {dtype for c in found if c.kind == "all-gather" for dtype, shape in c.arrays if shape in kernels}
    assert gathered == {"bf16"}
    # The base has no gradient to be reduced.
    reduced = {shape for c in found if c.kind == "all-reduce" for _, shape in c.arrays}
    assert reduced and not reduced & kernels


def test_a_sliced_sharded_batch_would_be_caught():
    # What the row groups avoid: taking the leading quarter of a sharded batch moves rows between devices.
    mesh = make_mesh(MeshShape(8, 1, 1))
    rows = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=batch_sharding(mesh))
    take = jax.jit(lambda x: x[:8] * 2.0, out_shardings=batch_sharding(mesh))
    kinds = count_kinds(partitioned_hlo(take.lower(rows)))
    assert {"collective-permute", "all-gather", "all-to-all"} & set(kinds)


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_of_every_preset_has_a_rule_and_large_ones_are_split(name):
    from shortcut_jax.models.init import weight_shapes

    mesh = make_mesh(MeshShape(1, 4, 2))
    cfg = dataclasses.replace(PRESETS[name], step_size=True)
    shapes = weight_shapes(cfg)
    shardings = flat_paths(tree_shardings(mesh, shapes))
    for path, leaf in flat_paths(shapes).items():
        local = math.prod(shardings[path].shard_shape(leaf.shape))
        if "_blocks/" in path and path.endswith(("qkv/kernel", "attn_out/kernel", "mlp_in/kernel", "mlp_out/kernel")):
            assert local * 8 == leaf.size, path
        elif path.endswith("/kernel"):
            assert local * (8 if "modulation" in path else 4) == leaf.size, path


RELEASED = {
    "flux": PRESETS["flux-dev"],
    "vae": VaeConfig(),
    "t5": T5Config(),
    "clip": ClipConfig(),
    "clip_score": ClipPairConfig(),
    "inception": InceptionConfig(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_a_released_pipeline_has_a_rule_and_large_ones_are_split(kind):
    mesh = make_mesh(MeshShape(1, 4, 2))
    shapes = abstract_params(kind, RELEASED[kind])
    shardings = flat_paths(tree_shardings(mesh, shapes))
    for path, leaf in flat_paths(shapes).items():
        parts = leaf.size // math.prod(shardings[path].shard_shape(leaf.shape))
        if kind in ("vae", "inception") or path.endswith(("scale", "position_bias", "position_embedding")):
            assert parts == 1, path
        elif path.endswith("token_embedding"):
            assert shardings[path].shard_shape(leaf.shape) == (leaf.shape[0], leaf.shape[1] // 4)
        elif "encoder_blocks/" in path and path.endswith("kernel"):
            assert parts == 8, path
    if kind == "t5":
        kernel, shard = flat_paths(shapes)["encoder_blocks/mlp_gate/kernel"].shape, (24, 1024, 5120)
        assert kernel == (24, 4096, 10240)
        assert shardings["encoder_blocks/mlp_gate/kernel"].shard_shape(kernel) == shard


def test_an_unknown_parameter_is_an_error():
    mesh = make_mesh(MeshShape(8, 1, 1))
    with pytest.raises(KeyError, match="mystery"):
        tree_shardings(mesh, {"mystery": jax.ShapeDtypeStruct((4,), jnp.float32)})


def test_small_layers_are_whole_by_a_stated_rule():
    mesh = make_mesh(MeshShape(1, 4, 2))
    spec = lambda path, *shape, least=1000: leaf_spec(mesh, path, shape, least)
    split = PartitionSpec(None, "fsdp", "tensor")
    # It is the layer that counts, not the stack of them; tensor splits all the same.
    assert spec("double_blocks/img_mlp_in/kernel", 9, 20, 50) == (split, "")
    small, why = spec("double_blocks/img_mlp_in/kernel", 9, 20, 48)
    assert (
        small == PartitionSpec(None, None, "tensor")
        and why == "not over fsdp: 960 values, fewer than mesh.min_shard 1,000"
    )
    assert spec("0/mu/img_in/kernel", 8, 100)[0] == PartitionSpec(None, None)
    assert spec("img_in/kernel", 8, 100, least=0)[0] == PartitionSpec(None, "fsdp")
    # Why others are whole, or less split than the mesh.
    assert spec("img_in/kernel", 100, 50) == (PartitionSpec(None, None), "not over fsdp: 50 is not a multiple of 4")
    assert spec("img_in/bias", 5000) == (PartitionSpec(None), "whole by its rule")
    assert leaf_spec(make_mesh(MeshShape(8, 1, 1)), "img_in/kernel", (100, 50), 1000) == (
        PartitionSpec(None, None),
        "whole: the mesh has one device along fsdp",
    )


def test_the_table_and_its_summary_tell_what_is_whole():
    shapes = _on((1, 4, 2), **BOTH_BLOCKS, mesh__min_shard=2000).state_shapes.params
    table = dict(line.split("  ", 1) for line in describe_shardings(shapes, 2000).splitlines())
    assert table.keys() == flat_paths(shapes).keys()
    assert table["double_blocks/img_mlp_in/kernel"] == "(2, 32, 128)  (None, 'fsdp', 'tensor')"
    assert table["img_in/kernel"].endswith("not over fsdp: 128 values, fewer than mesh.min_shard 2,000")
    whole = [path for path, leaf in flat_paths(shapes).items() if not any(leaf.sharding.spec)]
    assert {"img_in/kernel", "img_in/bias"} <= set(whole)
    assert summarise_shardings(shapes).startswith(f"{len(table) - len(whole)} of {len(table)} arrays are split, ")


@pytest.mark.slow
def test_a_small_layer_is_not_gathered_inside_a_step():
    assembly, hlo = _partitioned((1, 8, 1), batch_size=96, mesh__min_shard=10**9)
    assert set(count_kinds(hlo)) == {"all-reduce"}
    assert not any(any(x.sharding.spec) for x in jax.tree.leaves(assembly.state_shapes.params))


def test_specs_drop_axes_that_do_not_divide():
    mesh = make_mesh(MeshShape(2, 4, 1))
    assert fit_spec(mesh, ("fsdp", "tensor", None), (6, 8, 3)) == PartitionSpec(None, None, None)
    assert fit_spec(mesh, (("data", "fsdp"),), (16, 5)) == PartitionSpec(("data", "fsdp"), None)
    constrain = make_constrain(mesh)
    assert jax.jit(lambda x: constrain(x, ("batch", None)))(jnp.ones((3, 2))).shape == (3, 2)


def test_a_kernel_runs_on_each_device_with_its_own_rows_and_heads():
    mesh = make_mesh(MeshShape(2, 2, 2))
    q_BLHK = jnp.arange(8.0 * 3 * 4 * 2).reshape(8, 3, 4, 2)
    shapes = []

    def kernel(q, k, v):
        shapes.append(q.shape)
        return q + 2 * k - v

    np.testing.assert_array_equal(jax.jit(make_per_shard(mesh)(kernel))(q_BLHK, q_BLHK, q_BLHK), 2 * q_BLHK)
    assert set(shapes) == {(2, 3, 2, 2)}


def test_a_process_reads_exactly_the_rows_of_its_devices():
    mesh = make_mesh(MeshShape(2, 2, 2))
    np.testing.assert_array_equal(process_rows(batch_sharding(mesh), 16), np.arange(16))
    rows = np.arange(16)
    values = np.arange(32.0).reshape(16, 2)
    array = to_global({"x": values}, rows, batch_sharding(mesh), 16)["x"]
    np.testing.assert_array_equal(array, values)
    assert array.sharding == batch_sharding(mesh)


def test_rows_of_a_part_of_the_devices_are_ascending_and_not_always_contiguous():
    class Part:
        """A sharding as a process with two of four shards sees it."""

        def addressable_devices_indices_map(self, shape):
            del shape
            return {0: (slice(8, 12),), 1: (slice(0, 4),)}

    np.testing.assert_array_equal(process_rows(Part(), 16), [0, 1, 2, 3, 8, 9, 10, 11])
    assert isinstance(batch_sharding(make_mesh(MeshShape(8, 1, 1))), NamedSharding)
