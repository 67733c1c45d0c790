import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from shortcut_jax.core.tree import flat_paths
from shortcut_jax.models.clip import ClipConfig
from shortcut_jax.models.presets import PRESETS
from shortcut_jax.models.t5 import T5Config
from shortcut_jax.models.vae import VaeConfig
from shortcut_jax.runtime.hlo import collectives, count_kinds, partitioned_hlo
from shortcut_jax.runtime.sharding import (
    MeshShape,
    batch_sharding,
    fit_spec,
    make_constrain,
    make_mesh,
    make_per_shard,
    process_rows,
    to_global,
    tree_shardings,
)
from shortcut_jax.sources import KINDS, abstract_params
from shortcut_jax.steps.train_step import loss_and_gradients, make_rows
from shortcut_jax.steps.views import make_velocity
from tests.helpers import POST_TRAINING, noisy_state, random_batch, relative, tiny_assembly

MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2)]


def _on(mesh, **changes):
    data, fsdp, tensor = mesh
    count = data * fsdp * tensor
    return tiny_assembly(count, mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor, **changes)


def _loss_and_gradients(assembly):
    from shortcut_jax.resolve import step_settings

    settings = step_settings(assembly.settings, assembly.model)
    velocity_of = make_velocity(assembly.model, *assembly.latent_size)

    @jax.jit
    def evaluate(state, batch):
        loss, _, grads = loss_and_gradients(settings, velocity_of, state, make_rows(settings, jax.random.key(3), batch))
        return loss, grads

    return evaluate(noisy_state(assembly), random_batch(assembly))


def _three_steps(assembly):
    state = noisy_state(assembly)
    for seed in range(3):
        state, metrics = assembly.train_step(state, random_batch(assembly, seed))
    return state, metrics


@pytest.fixture(scope="module")
def one_device():
    with jax.default_matmul_precision("highest"):
        assembly = _on((1, 1, 1))
        return _loss_and_gradients(assembly), _three_steps(assembly)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_eight_devices_equal_one(mesh, one_device, highest_precision):
    (loss, grads), (state, metrics) = one_device
    assembly = _on(mesh)
    sharded_loss, sharded_grads = _loss_and_gradients(assembly)
    assert abs(float(sharded_loss) - float(loss)) <= 1e-5 * abs(float(loss))
    assert relative(sharded_grads, grads) <= 1e-5
    sharded_state, sharded_metrics = _three_steps(assembly)
    assert relative(sharded_state.params, state.params) <= 1e-5
    assert relative(sharded_state.ema.fast, state.ema.fast) <= 1e-5
    assert relative(sharded_state.ema.slow, state.ema.slow) <= 1e-5
    assert abs(float(sharded_metrics["loss"]) - float(metrics["loss"])) <= 1e-4 * float(metrics["loss"])
    # Not vacuous: the steps moved the weights far beyond the tolerance, and the state really is split.
    assert relative(state.params, noisy_state(tiny_assembly()).params) > 1e-2
    kernel = sharded_state.params["single_blocks"]["mlp_in"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[1:] == (32 // mesh[1], 128 // mesh[2])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 4, 1), (2, 2, 2)], ids=str)
def test_eight_devices_equal_one_in_post_training(mesh, highest_precision):
    one, eight = _on((1, 1, 1), **POST_TRAINING), _on(mesh, **POST_TRAINING)
    (loss, grads), (sharded_loss, sharded_grads) = _loss_and_gradients(one), _loss_and_gradients(eight)
    assert abs(float(sharded_loss) - float(loss)) <= 1e-5 * abs(float(loss))
    assert relative(sharded_grads, grads) <= 1e-5
    (state, metrics), (sharded, sharded_metrics) = _three_steps(one), _three_steps(eight)
    for name in ("params", "ema"):
        assert relative(getattr(sharded, name), getattr(state, name)) <= 1e-5
    assert abs(float(sharded_metrics["loss/teacher"]) - float(metrics["loss/teacher"])) <= 1e-4
    assert relative(state.params, noisy_state(one).params) > 1e-2
    # Base and adapters are split: heads and MLP width over tensor, the other large axis over fsdp.
    _, fsdp, tensor = mesh
    shards = lambda tree, path: flat_paths(tree)[path].sharding.shard_shape(flat_paths(tree)[path].shape)
    assert shards(sharded.frozen.base, "single_blocks/mlp_in/kernel")[1:] == (32 // fsdp, 128 // tensor)
    assert shards(sharded.params, "single_blocks/mlp_in/a")[1:] == (32 // fsdp, 3)
    assert shards(sharded.params, "single_blocks/mlp_in/b")[1:] == (3, 128 // tensor)
    assert shards(sharded.ema.slow, "double_blocks/img_attn/qkv/b")[1:] == (3, 3, 2 // tensor, 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [{"train": "all"}, {"teacher_lora": "given", "guide": "both", "guidance": (1.0, 4.0)}], ids=str
)
def test_eight_devices_equal_one_for_other_teachers_and_guidance(kind, highest_precision):
    changes = POST_TRAINING | kind
    one, eight = _on((1, 1, 1), **changes), _on((2, 2, 2), **changes)
    (state, metrics), (sharded, sharded_metrics) = _three_steps(one), _three_steps(eight)
    for name in ("params", "ema"):
        assert relative(getattr(sharded, name), getattr(state, name)) <= 1e-5
    assert abs(float(sharded_metrics["loss"]) - float(metrics["loss"])) <= 1e-4 * float(metrics["loss"])
    assert relative(state.params, noisy_state(one).params) > 1e-2


def _partitioned(mesh, **changes):
    assembly = _on(mesh, **changes)
    return assembly, partitioned_hlo(assembly.train_step.lower(assembly.state_shapes, assembly.batch_shapes))


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
    return _partitioned((1, 8, 1), batch_size=96, model__compute_dtype="bfloat16", grad_reduce_dtype="float32")


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
def test_tensor_parallel_blocks_only_reduce():
    _, hlo = _partitioned((1, 1, 2))
    inside = [c for c in collectives(hlo) if "_blocks/" in c.line]
    assert {c.kind for c in inside} == {"all-reduce"}
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
    from shortcut_jax.assemble import init_params

    mesh = make_mesh(MeshShape(1, 4, 2))
    cfg = dataclasses.replace(PRESETS[name], step_size=True)
    shapes = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))
    shardings = flat_paths(tree_shardings(mesh, shapes))
    for path, leaf in flat_paths(shapes).items():
        local = math.prod(shardings[path].shard_shape(leaf.shape))
        if "_blocks/" in path and path.endswith(("qkv/kernel", "attn_out/kernel", "mlp_in/kernel", "mlp_out/kernel")):
            assert local * 8 == leaf.size, path
        elif path.endswith("/kernel"):
            assert local * 4 == leaf.size, path


RELEASED = {"flux": PRESETS["flux-dev"], "vae": VaeConfig(), "t5": T5Config(), "clip": ClipConfig()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_a_released_pipeline_has_a_rule_and_large_ones_are_split(kind):
    mesh = make_mesh(MeshShape(1, 4, 2))
    shapes = abstract_params(kind, RELEASED[kind])
    shardings = flat_paths(tree_shardings(mesh, shapes))
    for path, leaf in flat_paths(shapes).items():
        parts = leaf.size // math.prod(shardings[path].shard_shape(leaf.shape))
        if kind == "vae" or path.endswith(("scale", "position_bias", "position_embedding")):
            assert parts == 1, path
        elif path.endswith("token_embedding"):
            assert shardings[path].shard_shape(leaf.shape) == (leaf.shape[0], leaf.shape[1] // 4)
        elif path.startswith("encoder_blocks/") and path.endswith("kernel"):
            assert parts == 8, path
    if kind == "t5":
        kernel, shard = flat_paths(shapes)["encoder_blocks/mlp_gate/kernel"].shape, (24, 1024, 5120)
        assert kernel == (24, 4096, 10240)
        assert shardings["encoder_blocks/mlp_gate/kernel"].shard_shape(kernel) == shard


def test_an_unknown_parameter_is_an_error():
    mesh = make_mesh(MeshShape(8, 1, 1))
    with pytest.raises(KeyError, match="mystery"):
        tree_shardings(mesh, {"mystery": jax.ShapeDtypeStruct((4,), jnp.float32)})


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
