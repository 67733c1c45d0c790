import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from shortcut_jax.core.schedules import ShiftRule
from shortcut_jax.errors import ConvertedError
from shortcut_jax.formats import inference_checkpoint
from shortcut_jax.formats.inference_checkpoint import (
    LoraInfo,
    OrbaxParams,
    Sampling,
    Stored,
    complete_or_absent,
    read_record,
    write_params,
    write_record,
)
from shortcut_jax.models.clip import ClipConfig
from shortcut_jax.models.presets import preset
from shortcut_jax.models.t5 import T5Config
from shortcut_jax.models.vae import VaeConfig
from shortcut_jax.runtime.sharding import MeshShape, make_mesh

VALUES = {
    "some_blocks/qkv/kernel": np.arange(2 * 8 * 3, dtype=np.float32).reshape(2, 8, 3),
    "img_in/kernel": np.linspace(-1, 1, 16).reshape(4, 4).astype(ml_dtypes.bfloat16),
}


def test_parameters_written_one_by_one_are_read_into_shards_in_their_own_dtype(tmp_path):
    write_params(tmp_path / "flux", iter(VALUES.items()))
    mesh = make_mesh(MeshShape(1, 4, 2))
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    abstract = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding) for k, v in VALUES.items()}
    shapes = {
        "some_blocks": {"qkv": {"kernel": abstract["some_blocks/qkv/kernel"]}},
        "img_in": {"kernel": abstract["img_in/kernel"]},
    }
    lazy = OrbaxParams(tmp_path / "flux")
    assert {k: lazy.spec(k) for k in lazy} == {k: (v.dtype, v.shape) for k, v in VALUES.items()}
    for name, value in VALUES.items():
        np.testing.assert_array_equal(lazy[name].view("u1"), value.view("u1"))
    params = lazy.place(shapes)
    qkv, img_in = params["some_blocks"]["qkv"]["kernel"], params["img_in"]["kernel"]
    np.testing.assert_array_equal(qkv, VALUES["some_blocks/qkv/kernel"])
    np.testing.assert_array_equal(np.asarray(img_in, np.float32), VALUES["img_in/kernel"].astype(np.float32))
    assert img_in.dtype == ml_dtypes.bfloat16
    assert qkv.sharding.shard_shape(qkv.shape) == (2, 2, 3)


@pytest.mark.parametrize(("group_bytes", "loads"), [(2**24, 1), (40, len(VALUES))])
def test_small_parameters_are_read_together_and_each_time_anew(tmp_path, monkeypatch, group_bytes, loads):
    monkeypatch.setattr(inference_checkpoint, "_GROUP_BYTES", group_bytes)
    write_params(tmp_path / "flux", iter(VALUES.items()))
    lazy, asked = OrbaxParams(tmp_path / "flux"), []
    load = lazy._load
    monkeypatch.setattr(lazy, "_load", lambda tree: asked.append(tree) or load(tree))
    for _ in range(2):
        read = {name: lazy[name] for name in VALUES}
        for name, value in VALUES.items():
            np.testing.assert_array_equal(read[name].view("u1"), value.view("u1"))
            read[name][...] = 0  # is the caller's own
    assert len(asked) == 2 * loads
    with pytest.raises(KeyError):
        lazy["mystery"]


def test_the_record_gives_each_geometry_back(tmp_path):
    configs = {
        "flux": dataclasses.replace(preset("flux-dev"), compute_dtype="bfloat16", remat="full"),
        "vae": VaeConfig(widths=(8, 16), scale=0.5),
        "t5": T5Config(blocks=3),
        "clip": ClipConfig(end_token=7),
    }
    configs["lora"] = LoraInfo(preset("tiny"), {"proj_out": (4, 2.0)})
    sampling = Sampling(ShiftRule(dynamic=False, shift=3.0), 256)
    models = [Stored(kind, config, f"{kind}.safetensors", tmp_path) for kind, config in configs.items()]
    write_record(tmp_path, models, sampling)
    models, read_sampling = read_record(tmp_path)
    assert read_sampling == sampling
    read = {m.kind: m for m in models}
    assert read["flux"].config == preset("flux-dev")  # how it was computed is not part of what it is
    assert all(read[kind].config == configs[kind] for kind in ("vae", "t5", "clip", "lora"))
    assert read["t5"].origin == "t5.safetensors" and read["t5"].folder == tmp_path / "t5"


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConvertedError, match=r"models\.json cannot be read"):
        read_record(tmp_path)
    (tmp_path / "models.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(ConvertedError, match="has format version 99, not 1"):
        read_record(tmp_path)
    with pytest.raises(ConvertedError, match=r"/flux cannot be read"):
        OrbaxParams(tmp_path / "flux")


def test_a_folder_is_complete_or_absent(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), complete_or_absent(target, overwrite=False) as folder:
        (folder / "part").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.partial").mkdir()  # left by a kill
    with complete_or_absent(target, overwrite=False) as folder:
        (folder / "part").write_text("whole")
        assert not target.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ConvertedError, match="is there already"), complete_or_absent(target, overwrite=False):
        pytest.fail("not reached")
    with pytest.raises(RuntimeError, match="broken"), complete_or_absent(target, overwrite=True):
        raise RuntimeError("broken")
    assert (target / "part").read_text() == "whole"
    with complete_or_absent(target, overwrite=True):
        pass
    assert not (target / "part").exists()


def test_an_interrupt_while_replacing_keeps_the_old_one(tmp_path, monkeypatch):
    from pathlib import Path

    target, real = tmp_path / "out", Path.rename
    target.mkdir()
    (target / "part").write_text("old")

    def rename(self, other):
        if self.name == ".out.partial":
            raise KeyboardInterrupt
        return real(self, other)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", rename)
        with complete_or_absent(target, overwrite=True) as folder:
            (folder / "part").write_text("new")
    assert (target / "part").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / ".out.partial").write_text("a file, left by a kill")
    with complete_or_absent(target, overwrite=True) as folder:
        (folder / "part").write_text("new")
    assert (target / "part").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["out"]


ODD = [None, "x", True, -1, 10**30, float("inf"), [1] * 99, {"a": 1}]


def _leaves(value, place=()):
    yield place
    for key in value if isinstance(value, dict) else ():
        yield from _leaves(value[key], (*place, key))


def test_whatever_is_edited_in_a_record_is_read_or_one_line(tmp_path):
    flux = preset("tiny")
    stored = [Stored("flux", flux, "a", tmp_path), Stored("vae", VaeConfig(), "b", tmp_path)]
    stored += [
        Stored("clip", ClipConfig(), "c", tmp_path),
        Stored("lora", LoraInfo(flux, {"x": (4, 2.0)}), "d", tmp_path),
    ]
    write_record(tmp_path, stored, Sampling())
    text, refused, read = (tmp_path / "models.json").read_text(), 0, 0
    for place in _leaves(json.loads(text)):
        for odd in (*ODD, "absent"):
            record = {"whole": json.loads(text)}
            node = record
            *folders, name = ("whole", *place)
            for key in folders:
                node = node[key]
            node[name] = odd
            if odd == "absent" and place:
                del node[name]
            (tmp_path / "models.json").write_text(json.dumps(record["whole"]))
            try:
                models, sampling = read_record(tmp_path)
            except ConvertedError as error:
                line, refused = str(error), refused + 1
                assert "models.json" in line and "\n" not in line and len(line) < 500, (place, odd, line)
                continue
            read += 1
            assert isinstance(sampling.text_tokens, int) and all(isinstance(m.origin, str) for m in models)
    assert refused > 300 and read > 30, (refused, read)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 10**5, '{"format_version": ' + "9" * 5000 + "}", "\xff"])
def test_a_record_that_is_no_object_is_one_line(text, tmp_path):
    (tmp_path / "models.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConvertedError, match=r"models\.json cannot be read: .*convert again") as error:
        read_record(tmp_path)
    assert "\n" not in str(error.value)


def test_unknown_kinds_and_entries_are_named(tmp_path):
    write_record(tmp_path, [Stored("flux", preset("tiny"), "a", tmp_path)], Sampling())
    whole = json.loads((tmp_path / "models.json").read_text())

    def fails(change, text):
        record = json.loads(json.dumps(whole))
        change(record)
        (tmp_path / "models.json").write_text(json.dumps(record))
        with pytest.raises(ConvertedError, match=text):
            read_record(tmp_path)

    fails(lambda r: r["models"].update(unet=r["models"]["flux"]), "a model of the unknown kind 'unet'")
    fails(lambda r: r["models"]["flux"]["config"].update(colour=1), "the config of flux has unknown entries: colour")
    fails(lambda r: r["models"]["flux"]["config"].pop("heads"), "the config of flux has missing entries: heads")
    fails(lambda r: r["models"]["flux"]["config"].update(width="64"), "says width '64', which is not a whole number")
    fails(lambda r: r["models"]["flux"]["config"].update(width=10**12), "says width 1000000000000, which is out of")
    fails(lambda r: r["models"]["flux"]["config"].update(attention="x"), "says attention, which is no geometry")
    fails(lambda r: r.pop("sampling"), "it lacks 'sampling'")
    fails(lambda r: r["sampling"].update(text_states="some"), "text_states is 'some', but must be full or trimmed")
    fails(lambda r: r["sampling"]["shift"].update(max_tokens=256), "they must be two")
