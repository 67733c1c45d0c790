import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from shortcut_jax.core.fingerprint import fingerprint
from shortcut_jax.runtime.sharding import MeshShape, make_mesh


def _tree(dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    return {"a": {"kernel": jnp.asarray(rng.standard_normal((8, 6)), dtype)}, "bias": jnp.zeros(8, dtype)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn])
def test_equal_trees_have_equal_hashes_and_any_change_is_seen(dtype):
    tree = _tree(dtype)
    kernel = tree["a"]["kernel"]
    assert fingerprint(tree) == fingerprint(_tree(dtype)) and len(fingerprint(tree)) == 16
    others = [
        {**tree, "a": {"kernel": kernel.at[3, 2].multiply(-1)}},
        {**tree, "a": {"kernel": kernel[::-1]}},
        {**tree, "a": {"kernel": kernel.T.reshape(8, 6)}},
        {**tree, "a": {"kernel": kernel.reshape(6, 8)}},
        {**tree, "a": {"weight": kernel}},
        {**tree, "bias": jnp.zeros(9, dtype)},
        {"a": tree["a"]},
    ]
    hashes = [fingerprint(t) for t in (tree, *others)]
    assert len(set(hashes)) == len(hashes)


def test_two_exchanged_values_and_the_dtype_are_seen():
    tree = _tree()
    kernel = tree["a"]["kernel"]
    swapped = kernel.at[0, 0].set(kernel[7, 5]).at[7, 5].set(kernel[0, 0])
    assert fingerprint({**tree, "a": {"kernel": swapped}}) != fingerprint(tree)
    assert fingerprint(jax.tree.map(lambda x: x.astype(jnp.float32), tree)) != fingerprint(tree)


def test_the_hash_does_not_depend_on_the_mesh():
    tree = _tree()
    mesh = make_mesh(MeshShape(2, 4, 1))
    for spec in (PartitionSpec("fsdp"), PartitionSpec(("data", "fsdp"))):
        sharded = jax.tree.map(lambda x, spec=spec: jax.device_put(x, NamedSharding(mesh, spec)), tree)
        assert fingerprint(sharded) == fingerprint(tree)
