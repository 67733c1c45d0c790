import json

import ml_dtypes
import numpy as np
import pytest

from shortcut_jax.errors import SafetensorsError
from shortcut_jax.formats.safetensors import LazyTensors, Writer, shard_files
from shortcut_jax.weights.params import Spec

VALUES = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4).astype(ml_dtypes.bfloat16),
    "c": np.linspace(-2, 2, 5).astype(ml_dtypes.float8_e4m3fn),
    "d": np.float16(3.5).reshape(()),
}
SPECS = {k: Spec(v.dtype, v.shape) for k, v in VALUES.items()}


def _write(file, values=VALUES, order=None):
    with Writer(file, {k: Spec(v.dtype, v.shape) for k, v in values.items()}, {"format": "pt"}) as writer:
        for name in order or values:
            writer.write(name, values[name])


def test_what_was_written_in_any_order_is_read_by_torch_and_by_us(tmp_path):
    import torch
    from safetensors.torch import load_file

    file = tmp_path / "x.safetensors"
    _write(file, order=["c", "a", "d", "b"])
    ours, theirs = LazyTensors([file]), load_file(file)
    assert list(ours) == list(VALUES) and ours.metadata == {"format": "pt"}
    assert theirs["c"].dtype == torch.float8_e4m3fn and theirs["b"].dtype == torch.bfloat16
    for name, value in VALUES.items():
        assert ours[name].dtype == value.dtype and ours[name].shape == value.shape
        np.testing.assert_array_equal(ours[name].astype("f"), value.astype("f"))
        np.testing.assert_array_equal(theirs[name].float().numpy(), value.astype("f"))


def test_files_of_the_library_are_read(tmp_path):
    import torch
    from safetensors.torch import save_file

    tensors = {"w": torch.randn(3, 4).to(torch.bfloat16), "x": torch.arange(5)}
    save_file(tensors, tmp_path / "x.safetensors")
    ours = LazyTensors([tmp_path / "x.safetensors"])
    np.testing.assert_array_equal(ours["w"].astype("f"), tensors["w"].float().numpy())
    np.testing.assert_array_equal(ours["x"], tensors["x"].numpy())


def test_an_incomplete_file_never_appears(tmp_path):
    file = tmp_path / "x.safetensors"
    with pytest.raises(KeyboardInterrupt), Writer(file, SPECS, {}) as writer:
        writer.write("a", VALUES["a"])
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="never written, or not all of it: b, c, d"), Writer(file, SPECS, {}) as writer:
        writer.write("a", VALUES["a"])
    with pytest.raises(ValueError, match=r"a has shape \(3, 2\)"), Writer(file, SPECS, {}) as writer:
        writer.write("a", VALUES["a"].T)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_is_written_when_all_its_rows_are(tmp_path):
    file = tmp_path / "x.safetensors"
    value = np.arange(12, dtype=np.float32).reshape(4, 3)
    specs = {"a": Spec(value.dtype, value.shape), "b": SPECS["b"]}
    with Writer(file, specs, {}) as writer:
        writer.write("a", value[3:], 3)
        writer.write("b", VALUES["b"])
        writer.write("a", value[1:3], 1)
        writer.write("a", value[:1])
    np.testing.assert_array_equal(LazyTensors([file])["a"], value)
    for first, rows, message in (
        (0, value[:2], "never written, or not all of it: a$"),
        (1, value[:3], "never written, or not all of it: a$"),
        (2, value[:3], r"a has shape \(3, 3\) from row 2 on, but \(4, 3\) was announced"),
        (3, value[0], r"a has shape \(3,\) from row 3 on"),
    ):
        with pytest.raises(ValueError, match=message), Writer(tmp_path / "y.safetensors", specs, {}) as writer:
            writer.write("b", VALUES["b"])
            writer.write("a", rows, first)
    with pytest.raises(ValueError, match="rows of a are written twice"), Writer(file, specs, {}) as writer:
        writer.write("a", value[:2])
        writer.write("a", value[1:], 1)
    assert [f.name for f in tmp_path.iterdir()] == ["x.safetensors"]


def test_damaged_files_are_named(tmp_path):
    file = tmp_path / "x.safetensors"
    with pytest.raises(SafetensorsError, match=r"x\.safetensors is missing"):
        LazyTensors([file])
    _write(file)
    whole = file.read_bytes()
    for broken in (whole[:-3], whole[:20], b"PK\x03\x04" + whole[4:], b""):
        file.write_bytes(broken)
        with pytest.raises(SafetensorsError, match=r"x\.safetensors is cut off or not a safetensors file"):
            LazyTensors([file])


def test_shards_are_those_of_the_index(tmp_path):
    first, second = "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"
    _write(tmp_path / first, {"a": VALUES["a"]})
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": first, "b": second}}))
    with pytest.raises(SafetensorsError, match=r"names m-00002-of-00002\.safetensors, which is not found"):
        shard_files(tmp_path)
    _write(tmp_path / second, {"b": VALUES["b"]})
    _write(tmp_path / "stray.safetensors", {"z": VALUES["a"]})
    assert shard_files(tmp_path) == [tmp_path / first, tmp_path / second]
    assert set(LazyTensors(shard_files(tmp_path))) == {"a", "b"}
    with pytest.raises(SafetensorsError, match=r"m-00001-of-00002\.safetensors is one of 2 shards: give their folder"):
        shard_files(tmp_path / first)
    with pytest.raises(SafetensorsError, match="a is in another file"):
        LazyTensors([tmp_path / first, tmp_path / "stray.safetensors", tmp_path / first])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SafetensorsError, match="no safetensors file in"):
        shard_files(tmp_path / "empty")


def test_incomplete_shards_and_several_indices_are_refused(tmp_path):
    names = [f"m-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for name, value in zip(names, "abc", strict=True):
        _write(tmp_path / name, {value: VALUES[value]})
    assert len(shard_files(tmp_path)) == 3
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SafetensorsError, match=r"m-00003-of-00003\.safetensors of 3 shards are missing"):
        shard_files(tmp_path)
    (tmp_path / "l.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SafetensorsError, match=r"several indices: give one of l\.safe.*, m\.safetensors\.index"):
        shard_files(tmp_path)
    for file in tmp_path.glob("*.json"):
        file.unlink()
    (tmp_path / names[1]).unlink()
    with pytest.raises(SafetensorsError, match=r"m-00002-of-00003\.safetensors of 3 shards are missing"):
        shard_files(tmp_path)


def test_an_interrupt_while_space_is_taken_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.posix_fallocate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Writer(tmp_path / "x.safetensors", SPECS, {})
    assert list(tmp_path.iterdir()) == []
