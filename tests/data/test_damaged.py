"""Prepared sets that are damaged: each is one line, which names what is damaged."""

import dataclasses
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from shortcut_jax.data.arrays import read_headers
from shortcut_jax.data.format import PreparedSet
from shortcut_jax.data.pipeline import BatchReader, batches
from shortcut_jax.data.records import DataSettings, check_available
from shortcut_jax.data.stored import Piece, Records
from shortcut_jax.data.training import TrainingData
from shortcut_jax.errors import DataError
from shortcut_jax.preparation.inspect import inspect
from tests.data.prepared import LATENTS, TEXT, write_small_set

COUNTS = (9, 6)


def _settings(folder, store="pixels", **changes):
    kind = dict(store=store, height=16, width=16, text_tokens=TEXT.tokens)
    kind |= dict(stride=LATENTS.stride, text_encoder="stored") if store == "latents" else {}
    return DataSettings(name=str(folder), **{**kind, **changes})


def _read_all(folder, store="pixels", **options):
    """Reads as training does."""
    data = TrainingData(_settings(folder, store))
    encode = lambda caption: (np.zeros((8, 16), np.float32), np.zeros(16, np.float32))
    reader = BatchReader(data, encode, np.arange(4), 4, seed=0)
    return list(batches(reader, 0, 8, **options)), data.prompts


def _change(folder, **values):
    path = folder / "set.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _shard(folder, number=1):
    return sorted(folder.glob("*.array_record-*"))[number]


def _refused(read, *told):
    with pytest.raises(DataError) as error:
        read()
    text = str(error.value)
    assert "\n" not in text and len(text) < 700, text
    assert all(part in text for part in told), text


DAMAGES = {
    "shard cut off": (lambda f: _shard(f).write_bytes(_shard(f).read_bytes()[:-99]), ("00001-of-00003 is damaged",)),
    "shard of zeros": (lambda f: _shard(f).write_bytes(bytes(131072)), ("00001-of-00003 is damaged",)),
    "shard empty": (lambda f: _shard(f).write_bytes(b""), ("00001-of-00003 is damaged", "64KB")),
    "shard missing": (lambda f: _shard(f).unlink(), ("00001-of-00003 is missing",)),
    "shard of another": (
        lambda f: _shard(f).write_bytes(_shard(write_small_set(f.parent / "b", "pixels", (2, 1))).read_bytes()),
        ("00001-of-00003 holds 1 records, but 5 are expected",),
    ),
    "index pickled": (
        lambda f: np.savez(f / "index.npz", train=np.array([{}, None], object)),
        ("index.npz is damaged (train.npy holds Python objects",),
    ),
    "index garbage": (lambda f: (f / "index.npz").write_bytes(b"x" * 99), ("index.npz is damaged (File is not a zip",)),
    "index missing": (lambda f: (f / "index.npz").unlink(), ("index.npz is damaged", "No such file")),
    "index short": (
        lambda f: np.savez(f / "index.npz", train=np.zeros(3, np.uint16)),
        ("index.npz is damaged", "lacks the buckets of 15 records"),
    ),
    "index of others": (
        lambda f: np.savez(f / "index.npz", train=np.full(15, 7, np.uint16)),
        ("index.npz is damaged", "not those that set.json counts"),
    ),
    "features garbage": (lambda f: (f / "features.json").write_text("{"), ("cannot open the records",)),
    "features missing": (lambda f: (f / "features.json").unlink(), ("cannot open the records",)),
    "info missing": (lambda f: (f / "dataset_info.json").unlink(), ("cannot open the records",)),
    "absurd counts": (
        lambda f: _change(f, counts={"train": [10**12, 6]}),
        ("set.json counts 1,000,000,000,006 records of 'train', but its shards hold 15",),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_training_and_inspect_name_what_is_damaged(tmp_path, damage):
    folder = write_small_set(tmp_path / "set", "pixels", COUNTS)
    act, told = DAMAGES[damage]
    act(folder)
    _refused(lambda: _read_all(folder), *told)
    _refused(lambda: inspect(folder, tmp_path / "sheet.png"), *told)


def _write_other_records(folder, change, which=(3,)):
    """Writes the second shard anew, some of its records changed."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    from shortcut_jax.preparation.units import WRITER_OPTIONS

    path = _shard(folder)
    reader = ArrayRecordReader(str(path))
    records = [reader.read([i])[0] for i in range(reader.num_records())]
    reader.close()
    writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
    for i, record in enumerate(records):
        writer.write(change(record) if i in which else record)
    writer.close()


@pytest.mark.parametrize(
    "change",
    [lambda data: b"nonsense", lambda data: data.replace(b"PNG", b"XXX"), lambda data: b""],
    ids=["proto", "png", "empty"],
)
@pytest.mark.parametrize("small", [True, False], ids=["in memory", "streamed"])
def test_a_damaged_record_is_named_with_its_shard(tmp_path, monkeypatch, change, small):
    if not small:
        monkeypatch.setattr("shortcut_jax.data.training.in_memory", lambda records, size: records)
    folder = write_small_set(tmp_path / "set", "pixels", COUNTS)
    _write_other_records(folder, change)
    told = "record 3 of", "array_record-00001-of-00003 is damaged"
    _refused(lambda: _read_all(folder, threads=2), *told)
    _write_other_records(folder, change, range(5))  # inspect looks at a few images only
    _refused(lambda: inspect(folder, tmp_path / "sheet.png"), told[1])


def test_a_record_of_another_size_than_its_bucket_is_named(tmp_path):
    folder = write_small_set(tmp_path / "set", "pixels", (6, 6))
    index = PreparedSet(folder).buckets("train")
    np.savez(folder / "index.npz", train=(1 - index).astype(np.uint16))
    _refused(lambda: _read_all(folder), "record ", "its latents are", "those of its bucket")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: (f / "prompts.safetensors").write_bytes(b"x"), "prompts.safetensors is damaged"),
        (lambda f: (f / "prompts.safetensors").unlink(), "prompts.safetensors is damaged"),
        (lambda f: _change(f, eval_prompts=["a cat"]), "it lacks the states of 2 captions"),
    ],
)
def test_damaged_prompts_are_told(tmp_path, damage, told):
    folder = write_small_set(tmp_path / "set", "latents", COUNTS)
    damage(folder)
    _refused(lambda: _read_all(folder, "latents"), told)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"buckets": "16x16"}, "its buckets cannot be '16x16'"),
        ({"buckets": []}, "its buckets cannot be []"),
        ({"buckets": [[16, 16], [8, 1e99]]}, "its buckets cannot be"),
        ({"buckets": [[16, 16, 3], [8, 8, 3]]}, "its buckets cannot be"),
        ({"counts": [9, 6]}, "its counts cannot be"),
        ({"counts": {"train": 15}}, "its counts cannot be"),
        ({"counts": {"train": [9, -6]}}, "its counts cannot be"),
        ({"counts": {"train": [9, True]}}, "its counts cannot be"),
        ({"counts": {"train": [15]}}, "its counts are not of 2 buckets each"),
        ({"counts": {"train": [0, 0]}}, "it counts no records"),
        ({"counts": {}}, "it counts no records"),
        ({"store": "tensors"}, "its store cannot be 'tensors'"),
        ({"store": "latents"}, "a set of latents has text and latents"),
        ({"text": {"states": "full"}}, "its text cannot be"),
        ({"text": {**dataclasses.asdict(TEXT), "tokens": 10**15}}, "its text cannot be"),
        ({"latents": {**dataclasses.asdict(LATENTS), "scale": float("nan")}}, "its latents cannot be"),
        ({"eval_prompts": "a cat"}, "its eval_prompts cannot be"),
        ({"encoders": {"vae": "x"}}, "its encoders cannot be"),
        ({"skipped": None}, "its skipped cannot be"),
        ({"unused": {"files": "3"}}, "its unused cannot be"),
        ({"format_version": "1"}, "its format_version cannot be"),
        ({"surprise": 1}, "it has an unknown 'surprise'"),
    ],
)
def test_wrong_types_in_set_json_are_one_line(tmp_path, values, told):
    folder = write_small_set(tmp_path / "set", "pixels", COUNTS)
    _change(folder, **values)
    _refused(lambda: PreparedSet(folder), f"{folder / 'set.json'} cannot be read: ", told)


def test_older_sets_without_the_newer_fields_are_read(tmp_path):
    folder = write_small_set(tmp_path / "set", "pixels", COUNTS)
    stored = json.loads((folder / "set.json").read_text())
    del stored["unused"]
    (folder / "set.json").write_text(json.dumps(stored))
    assert PreparedSet(folder).info.unused == {}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[]", "it holds a list, not an object"),
        ("null", "it holds a NoneType"),
        ('{"store": "pixels"}', "it has no buckets"),
        ("{", "cannot be read"),
        ("", "cannot be read"),
        ('{"format_version": ' + "1" * 5000 + "}", "cannot be read"),
    ],
)
def test_a_set_json_that_is_none_is_one_line(tmp_path, text, told):
    folder = write_small_set(tmp_path / "set", "pixels", COUNTS)
    (folder / "set.json").write_text(text)
    _refused(lambda: PreparedSet(folder), str(folder / "set.json"), told)
    (folder / "set.json").write_bytes(b"\xff\xfe\x00")
    _refused(lambda: PreparedSet(folder), str(folder / "set.json"), "cannot be read")


def test_a_set_without_the_split_is_told_before_anything_is_opened(tmp_path, data_dir):
    folder = write_small_set(tmp_path / "set", "pixels", COUNTS, splits=("validation",))
    _refused(lambda: check_available(_settings(folder)), "has no split 'train': it has validation (15 records)")
    settings = DataSettings(dir=data_dir, split="test")
    _refused(lambda: check_available(settings), "'digits'", "has no split 'test': it has train (1,797 records)")
    assert TrainingData(dataclasses.replace(settings, split="train[:10]")).num_records == 10


def test_a_tfds_set_without_images_is_told_how_to_prepare_it(tmp_path):
    write_small_set(tmp_path / "plain", "latents", COUNTS)
    (tmp_path / "plain" / "set.json").unlink()  # what is left is a set of TFDS
    (tmp_path / "plain").rename(tmp_path / "moved")
    (tmp_path / "plain").mkdir()
    (tmp_path / "moved").rename(tmp_path / "plain" / "1.0.0")
    settings = DataSettings(name="plain", dir=str(tmp_path))
    _refused(lambda: check_available(settings), "'plain'", "has no image, only caption", "prepare --source=tfds:plain")


def test_headers_are_read_without_what_they_announce(tmp_path):
    path = tmp_path / "bomb.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 30,)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train.npy", header.getvalue())
    with pytest.raises(ValueError, match="cut off"):
        read_headers(path)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"one array \(\.npy\)"):
        read_headers(tmp_path / "one.npy")


def test_a_field_that_a_set_declares_optional_may_be_absent():
    source = [{"image": 1, "note": None}]
    piece = [Piece(Path("shard"), 0, 1)]
    assert Records(source, piece, frozenset({"note"}))[0] == source[0]
    with pytest.raises(DataError, match=r"record 0 of shard is damaged .*it has no note"):
        Records(source, piece)[0]
