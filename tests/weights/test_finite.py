import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from shortcut_jax.errors import ConversionError
from shortcut_jax.runtime.sharding import MeshShape, make_mesh
from shortcut_jax.weights import finite
from shortcut_jax.weights.finite import Finite, check_finite, check_placed, count_not_finite
from shortcut_jax.weights.params import Cast
from tests.helpers import Watched

DTYPES = [np.float32, np.float16, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_every_value_that_is_not_finite_is_counted(dtype, monkeypatch):
    monkeypatch.setattr(finite, "_CHUNK", 7)  # so that there are several, and a last one that is shorter
    bad = np.array([np.nan, np.inf, -np.inf]).astype(dtype)
    edge = float(ml_dtypes.finfo(dtype).max)
    values = np.concatenate([np.array([0.0, -1.0, edge, -edge] * 5).astype(dtype), bad]).reshape(-1, 1)
    expected = int(np.count_nonzero(~np.isfinite(bad.astype(np.float64))))
    assert expected and count_not_finite(values) == count_not_finite(values.T) == expected
    assert count_not_finite(values[:20]) == 0


def test_whole_numbers_are_finite():
    assert count_not_finite(np.arange(3)) == 0


def test_the_tensor_is_named_and_a_cast_that_overflows_is_told_apart():
    good, large, broken = np.ones((2, 2), "f"), np.full(3, 3.4e38, "f"), np.array([1, np.nan], "f")
    assert check_finite("a", good) is good
    source = {"good": good, "large": large, "broken": broken}
    lazy = Finite(Cast(source, np.dtype(ml_dtypes.bfloat16)), source)
    np.testing.assert_array_equal(lazy["good"].astype("f"), good)
    assert lazy.spec("large").dtype == ml_dtypes.bfloat16 and list(lazy) == list(source) and len(lazy) == 3
    with pytest.raises(ConversionError, match=r"^large has values beyond the range of bfloat16: convert with --dtype"):
        lazy["large"]
    with pytest.raises(ConversionError, match=r"^broken has 1 of 2 values that are NaN or infinite"):
        lazy["broken"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_sharded_arrays_are_checked_where_they_are_and_named(dtype, bad):
    sharding = NamedSharding(make_mesh(MeshShape(1, 8, 1)), PartitionSpec("fsdp"))
    put = lambda values: jax.device_put(values.astype(dtype), sharding)
    edge = np.full((16, 3), float(ml_dtypes.finfo(dtype).max))
    broken = np.zeros((16, 3))
    broken[13, 1] = bad  # on one device of eight
    good = {"a": {"kernel": put(edge)}, "ids": jax.device_put(np.arange(16), sharding)}
    assert check_placed(good, "x.safetensors") is good and check_placed({}, "x") == {}
    with pytest.raises(
        ConversionError, match=rf"^x\.safetensors: b/bias has values that are NaN or infinite in {np.dtype(dtype)}:"
    ):
        check_placed(good | {"b": {"bias": put(broken)}}, "x.safetensors")
    with pytest.raises(ConversionError, match=r"^x: b0, b1, b2 and 2 more have values"):
        check_placed({f"b{i}": put(broken) for i in range(5)}, "x")


def test_to_ask_for_a_name_reads_no_values():
    watched = Watched(["a"], lambda name: {"a": np.full(3, np.nan, np.float32)}[name])
    assert "a" in Finite(watched) and "b" not in Finite(watched) and watched.most == 0
