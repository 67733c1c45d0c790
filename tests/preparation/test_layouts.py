"""The layouts that captioned images come in, each as a small real folder."""

import io
import json
import os
import tarfile

import pytest

from shortcut_jax import prepare
from shortcut_jax.data.format import PreparedSet
from shortcut_jax.errors import DataError
from shortcut_jax.preparation.inputs import NAMES, Item, SourceOptions, open_source
from shortcut_jax.preparation.inputs.layouts import LAYOUTS
from tests.data.images import encoded, noise_image

PNG = encoded(noise_image())
IMAGES = [encoded(noise_image(i)) for i in range(4)]


def _write(folder, files):
    """`files`: name -> bytes or text."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def _read(source, **options):
    """Captions by key, skips by key, and what was said."""
    lines = []
    opened = open_source(str(source), SourceOptions(**options), lines.append)
    items = [item for unit in opened.units for item in opened.items(unit)]
    assert opened.num_items == len(items) == sum(unit.size for unit in opened.units)
    kept = {i.key: i.caption for i in items if isinstance(i, Item)}
    return kept, {i.key: i.reason for i in items if not isinstance(i, Item)}, "\n".join(lines)


def _lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_images_with_captions_beside_them(tmp_path):
    files = {
        "10_sks dog/a.png": PNG,
        "10_sks dog/a.txt": "a dog\n",
        "10_sks dog/IMG.v1.JPG": PNG,
        "10_sks dog/IMG.v1.TXT": "photo, v1",
        "b.webp": PNG,
        "b.caption": "of kohya",
        "c.png": PNG,
        "c.txt": "the text is read",
        "c.json": '{"caption": "not this"}',
        "d.jpeg": PNG,
        "d.json": '{"caption": "of the json"}',
        "two.jpg": PNG,
        "two.png": PNG,
        "two.txt": "of both",
        "alone.png": PNG,
        "orphan.txt": "no image",
        "empty.png": PNG,
        "empty.txt": "",
        "bytes.png": PNG,
        "bytes.txt": b"\xff\xfe",
        "notes.md": "x",
        ".DS_Store": "x",
        "cache/a.npz": "x",
    }
    kept, skipped, said = _read(_write(tmp_path, files), unit=3)
    assert kept == {
        "10_sks dog/a.png": "a dog",
        "10_sks dog/IMG.v1.JPG": "photo, v1",
        "b.webp": "of kohya",
        "c.png": "the text is read",
        "d.jpeg": "of the json",
        "two.jpg": "of both",
        "two.png": "of both",
    }
    assert skipped == {
        "alone.png": "missing caption",
        "orphan.txt": "missing image",
        "empty.png": "empty caption",
        "bytes.png": "not UTF-8",
    }
    for told in (
        "images with a .txt or .caption of the same name",
        "captions: 7 of .txt, 1 of .caption, 1 of .json",
        "repeats in the names of folders are not used",
        "not read: 4 other files (c.json, cache/a.npz, notes.md, ...)",
    ):
        assert told in said, said
    kept, skipped, _ = _read(tmp_path, caption_field="caption")
    assert kept == {"c.png": "not this", "d.jpeg": "of the json"} and len(skipped) == 8
    first = open_source(str(tmp_path), SourceOptions()).fingerprint
    (tmp_path / "b.caption").write_text("of KOHYA")
    os.utime(tmp_path / "b.caption", (1, 1))
    assert open_source(str(tmp_path), SourceOptions()).fingerprint != first


def test_parquet_files_of_no_split_beside_those_of_train(tmp_path):
    for name in ("train-0", "more", "test-0", "test-1"):
        _parquet(tmp_path / f"{name}.parquet", _rows(0, 2))
    kept, _, said = _read(tmp_path)
    assert len(kept) == 2 and "None" not in said
    assert "files of no split are not read: 1 file" in said and "the split test is not read: 2 files" in said


def test_a_caption_field_without_json_is_refused(tmp_path):
    _write(tmp_path, {"a.png": PNG, "a.txt": "x"})
    with pytest.raises(DataError, match=r"--caption_field=x: no image in .* has a \.json beside it"):
        _read(tmp_path, caption_field="x")


def test_metadata_csv(tmp_path):
    table = (
        '\ufefffile_name,text,kind\r\na/1.png,"a ""big"", red\nball",x\r\n2.png,plain,y\r\n\r\n'
        "4.png,a, comma, more\r\n5.png\r\n2.png,again,y\r\n,nothing,y\r\n"
    )
    files = {f"{name}.png": PNG for name in ("a/1", "2", "4", "5", "unlisted")}
    kept, skipped, said = _read(_write(tmp_path, {"metadata.csv": table, **files, "README.md": "x"}), unit=2)
    assert kept == {"a/1.png": 'a "big", red\nball', "2.png": "plain"}
    assert (
        "metadata.csv (the same columns)" in said and "not read: 3 other files (4.png, README.md, unlisted.png)" in said
    )
    assert skipped == {
        "metadata.csv:6": "bad CSV",  # more fields than the header has: a caption with a comma, not in quotes
        "5.png": "missing field",
        "2.png": "duplicate key",
        "metadata.csv:9": "missing field",
    }
    kept, skipped, _ = _read(tmp_path, where=("kind=y",))
    assert kept == {"2.png": "plain"} and "a/1.png" not in skipped  # which another row names


def test_a_quote_that_is_never_closed_costs_no_row_in_silence(tmp_path):
    files = {f"{name}.png": PNG for name in range(4)}
    _write(tmp_path, {"metadata.csv": 'file_name,text\n0.png,zero\n1.png,"one\n2.png,two\n3.png,three\n', **files})
    kept, skipped, said = _read(tmp_path)
    assert kept == {"0.png": "zero"} and skipped == {"metadata.csv:3": "bad CSV"}
    assert "not read: 3 other files (1.png, 2.png, 3.png)" in said


def test_metadata_jsonl_with_text_or_a_named_field(tmp_path):
    rows = {"file_name": "1.png", "text": "one"}, {"file_name": "2.png", "text": "two", "long": "long two"}
    _write(tmp_path, {"metadata.jsonl": _lines(*rows), "1.png": PNG, "2.png": PNG})
    assert _read(tmp_path)[0] == {"1.png": "one", "2.png": "two"}
    kept, skipped, _ = _read(tmp_path, caption_field="long")
    assert kept == {"2.png": "long two"} and skipped == {"1.png": "missing field"}


@pytest.mark.parametrize(
    "rows, options, told",
    [
        ([{"image": "1.png", "text": "x"}], {}, "has no file_name, the image of a row: its fields are image, text"),
        (
            [{"file_name": "1.png", "tags": "x"}],
            {},
            "captions with --caption_field=FIELD; its fields are file_name, tags",
        ),
        ([{"file_name": "1.png", "text": "x"}], {"caption_field": "y"}, "--caption_field=y is in no row of"),
        ([{"file_name": "1.png", "text": "x"}], {"template": "a"}, "--template does not go with metadata"),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_table_without_files_or_captions_is_refused_before_anything_is_read(tmp_path, rows, options, told, form):
    (row,) = rows
    text = _lines(row) if form == "jsonl" else f"{','.join(row)}\n{','.join(row.values())}\n"
    _write(tmp_path, {f"metadata.{form}": text, "1.png": PNG})
    with pytest.raises(DataError, match=told) as error:
        _read(tmp_path, **options)
    assert "\n" not in str(error.value)


def test_files_of_img2dataset(tmp_path):
    files = {"00000_stats.json": "{}", "00000.parquet": b"PAR1", "00001_stats.json": "{}", "00001.parquet": b"PAR1"}
    for shard, num in (("00000", 2), ("00001", 1)):
        for i in range(num):
            stem = f"{shard}/{shard}{i:04d}"
            meta = {"url": "http://x", "caption": f"alt {i}", "status": "success"}
            files |= {f"{stem}.jpg": PNG, f"{stem}.txt": f"caption {i}", f"{stem}.json": json.dumps(meta)}
    kept, skipped, said = _read(_write(tmp_path, files))
    assert kept == {
        "00000/000000000.jpg": "caption 0",
        "00000/000000001.jpg": "caption 1",
        "00001/000010000.jpg": "caption 0",
    }
    assert not skipped and "files of img2dataset" in said and "parquet" not in said.partition("not read")[2]
    assert set(_read(tmp_path, caption_field="caption")[0].values()) == {"alt 0", "alt 1"}


def test_class_folders_with_a_template(tmp_path):
    files = {"cat/1.jpg": PNG, "cat/2.png": PNG, "polar_bear/more/1.png": PNG, "polar_bear/1.png": PNG, "top.png": PNG}
    _write(tmp_path, {**files, "README.md": "x"})
    kept, skipped, said = _read(tmp_path, template="a photo of a {label}")
    assert kept == {
        "cat/1.jpg": "a photo of a cat",
        "cat/2.png": "a photo of a cat",
        "polar_bear/1.png": "a photo of a polar bear",
        "polar_bear/more/1.png": "a photo of a more",
    }
    assert skipped == {"top.png": "missing caption"} and "classes: 3 (cat, more, polar bear)" in said
    with pytest.raises(DataError, match=r"--template='a \{kind\}' cannot be filled in .* the fields are label"):
        _read(tmp_path, template="a {kind}")
    with pytest.raises(DataError, match=r"has 5 images, but no captions .*folders named after classes"):
        _read(tmp_path)


def _parquet(path, rows, image="image", **options):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = arrow.Table.from_pylist(rows)
    if "metadata" in options:
        table = table.replace_schema_metadata({"huggingface": json.dumps(options.pop("metadata"))})
    parquet.write_table(table, path, **options)


def _rows(first, num, **more):
    return [
        {"image": {"bytes": PNG, "path": f"{i}.png"}, "text": f"text {i}", "long": f"long {i}", **more}
        for i in range(first, num)
    ]


def test_parquet_files_of_datasets(tmp_path):
    rows = _rows(0, 10)
    rows[3]["image"]["bytes"] = None
    rows[4]["text"] = None
    _parquet(tmp_path / "data/train-00000-of-00002.parquet", rows, row_group_size=2)
    _parquet(tmp_path / "data/train-00001-of-00002.parquet", _rows(10, 13))
    _parquet(tmp_path / "data/test-00000-of-00001.parquet", _rows(20, 21))
    _write(tmp_path, {"README.md": "x"})
    kept, skipped, said = _read(tmp_path, unit=4)
    assert list(kept.values()) == [f"text {i}" for i in range(13) if i not in (3, 4)]
    assert skipped == {
        "data/train-00000-of-00002/00000003": "missing image",
        "data/train-00000-of-00002/00000004": "missing field",
    }
    for told in (
        "2 files, 13 rows; images: image",
        "the split test is not read: 1 file",
        "not read: 1 other file (README.md)",
    ):
        assert told in said, said
    source = open_source(str(tmp_path), SourceOptions(unit=4))
    assert [unit.size for unit in source.units] == [4, 4, 2, 3]  # row groups of two, never across files
    assert list(_read(tmp_path, caption_field="long")[0].values())[:2] == ["long 0", "long 1"]
    single = _read(tmp_path / "data/test-00000-of-00001.parquet")[0]
    assert single == {"test-00000-of-00001/00000000": "text 20"} == _read(f"{tmp_path}/data/test-*.parquet")[0]


def test_classes_in_parquet_files_fill_in_a_template(tmp_path):
    features = {"label": {"names": ["air_plane", "cat"], "_type": "ClassLabel"}, "img": {"_type": "Image"}}
    rows = [{"img": {"bytes": PNG, "path": None}, "label": label} for label in (1, 0, None, -1)]
    _parquet(tmp_path / "train.parquet", rows, metadata={"info": {"features": features}})
    kept, skipped, _ = _read(tmp_path, template="a {label}")
    assert list(kept.values()) == ["a cat", "a air plane"]
    assert skipped == {"train/00000002": "missing field", "train/00000003": "missing field"}
    for template in ("a {kind}", "a {", "a {}"):
        with pytest.raises(DataError, match=r"cannot be filled in .* the fields are label"):
            open_source(str(tmp_path), SourceOptions(template=template))
    with pytest.raises(DataError, match=r"no column prompt, caption, text: .* the columns are img, label"):
        _read(tmp_path)
    with pytest.raises(DataError, match=r"--caption_field=x is no column of .*the columns are img, label"):
        _read(tmp_path, caption_field="x")


@pytest.mark.parametrize(
    "make, told",
    [
        (
            lambda f: _parquet(f / "a.parquet", [{"text": "x", "url": "u"}]),
            "no column of images .* its columns are text, url",
        ),
        (lambda f: _write(f, {"a.parquet": b"PAR1 nothing"}), r"a\.parquet cannot be read as parquet"),
        (
            lambda f: (_parquet(f / "a/1.parquet", _rows(0, 1)), _parquet(f / "b/1.parquet", _rows(0, 1))),
            "folders a, b",
        ),
        (
            lambda f: (_parquet(f / "1.parquet", _rows(0, 1)), _parquet(f / "2.parquet", [{"z": 1}])),
            "have other columns",
        ),
    ],
)
def test_parquet_files_that_cannot_be_read_are_told_in_one_line(tmp_path, make, told):
    pytest.importorskip("pyarrow")
    make(tmp_path)
    with pytest.raises(DataError, match=told) as error:
        _read(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_splits_of_a_folder(tmp_path, form):
    for split in ("train", "validation", "test"):
        rows = [{"file_name": "1.png", "text": f"of {split}"}]
        _write(tmp_path, {f"{split}/1.png": PNG, f"{split}/metadata.jsonl": _lines(*rows), "README.md": "x"})
        _write(tmp_path, {"train/notes.md": "x", "test/2.png": PNG, ".git/HEAD": "x"})
        if form != "jsonl":
            (tmp_path / split / "metadata.jsonl").unlink()
        if form == "csv":
            _write(tmp_path, {f"{split}/metadata.csv": f"file_name,text\n1.png,of {split}\n"})
        if form == "parquet":
            _parquet(tmp_path / split / "metadata.parquet", rows)
    kept, skipped, said = _read(tmp_path)
    assert kept == {"1.png": "of train"} and not skipped
    assert f"reads {tmp_path}/train; not the splits test (3 files), validation (2 files)" in said
    assert "not read: 2 other files (notes.md, ../README.md), 1 folder not followed (../.git/, hidden)" in said
    assert open_source(str(tmp_path), SourceOptions()).unused == {
        "files of the split test": 3,
        "files of the split validation": 2,
        ".md files": 2,
        "folders that were not followed": 1,
    }


def test_folders_that_are_not_followed_are_told_as_such(tmp_path, monkeypatch):
    folder = _write(tmp_path / "a", {"1.png": PNG, "1.txt": "x", ".cache/2.png": PNG, "locked/3.png": PNG, ".x": "x"})
    (folder / "linked").symlink_to(_write(tmp_path / "b", {"4.png": PNG, "4.txt": "x"}))
    scandir = os.scandir

    def locked(path):  # root may read everything
        if os.path.basename(path) == name:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    name = "locked"
    monkeypatch.setattr(os, "scandir", locked)
    kept, _, said = _read(folder)
    assert kept == {"1.png": "x"}
    told = ".cache/, hidden; linked/, a link; locked/, Permission denied"
    assert f"not read: 1 other file (.x), 3 folders not followed ({told})" in said
    assert open_source(str(folder), SourceOptions()).unused == {
        "folders that were not followed": 3,
        "files without an ending": 1,
    }
    name = "a"
    with pytest.raises(PermissionError):  # which the command tells in one line
        _read(folder)


@pytest.mark.parametrize("layout", ["metadata.jsonl", "tars", "parquet", "sidecars", "classes"])
def test_files_that_are_not_used_reach_the_set(tmp_path, layout):
    folder = _write(tmp_path / "a", {"README.md": "x", "masks/1.npz": "x", "masks/2.npz": "x", ".git/HEAD": "x"})
    options = {"template": "{label}"} if layout == "classes" else {}
    names = [f"cat/{i}" for i in range(4)]
    images = {f"{name}.png": image for name, image in zip(names, IMAGES, strict=True)}
    if layout == "metadata.jsonl":
        rows = [{"file_name": f"{name}.png", "text": name} for name in names]
        _write(folder, images | {"metadata.jsonl": _lines(*rows)})
    elif layout == "tars":
        with tarfile.open(folder / "a.tar", "w") as tar:
            for name, content in sorted((images | {f"{name}.txt": b"x" for name in names}).items()):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    elif layout == "parquet":
        rows = _rows(0, 4)
        for split in ("train", "test"):
            _parquet(folder / f"data/{split}-00000.parquet", rows)
        _parquet(folder / "data/more.parquet", rows)
    else:
        _write(folder, images | ({f"{name}.txt": "x" for name in names} if layout == "sidecars" else {}))
    flags = [f"--{name}={value}" for name, value in options.items()]
    assert prepare.main(["prepare", f"--source={folder}", f"--out={tmp_path / 'set'}", "--resolution=32", *flags]) == 0
    further = {"files of the split test": 1, "files of no split": 1} if layout == "parquet" else {}
    assert (
        PreparedSet(tmp_path / "set").info.unused
        == {
            ".md files": 1,
            ".npz files": 2,
            "folders that were not followed": 1,
        }
        | further
    )


def test_a_class_called_train_is_no_split(tmp_path):
    _write(tmp_path, {"train/1.png": PNG, "car/1.png": PNG})
    assert sorted(_read(tmp_path, template="{label}")[0].values()) == ["car", "train"]


def _cache(folder):
    """A snapshot as huggingface_hub lays it out: files are links into blobs/."""
    repo = folder / "hub/datasets--someone--cats"
    snapshot = repo / "snapshots/0123abc"
    rows = [{"file_name": "train/1.png", "text": "a cat"}]
    _write(repo, {"blobs/aa": PNG, "blobs/bb": _lines(*rows), "refs/main": "0123abc"})
    (snapshot / "train").mkdir(parents=True)
    (snapshot / "train/1.png").symlink_to("../../../blobs/aa")
    (snapshot / "metadata.jsonl").symlink_to("../../blobs/bb")
    return snapshot


def test_links_of_a_hugging_face_cache_are_read(tmp_path):
    snapshot = _cache(tmp_path)
    assert _read(snapshot)[0] == {"train/1.png": "a cat"}
    with pytest.raises(
        DataError, match=r"cache of the Hugging Face Hub: give the snapshot in it, .*/snapshots/0123abc$"
    ):
        _read(snapshot.parent.parent)
    (snapshot / "metadata.jsonl").unlink()
    (snapshot / "train/1.txt").symlink_to("../../../blobs/bb")
    assert len(_read(snapshot)[0]) == 1
    (tmp_path / "secret.png").write_bytes(PNG)
    (snapshot / "train/2.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match=r"2\.png is a link that leads out of the folder"):
        _read(snapshot)


def test_links_out_of_a_folder_without_a_cache_are_refused(tmp_path):
    secret = _write(tmp_path, {"blobs/secret.png": PNG}) / "blobs/secret.png"
    folder = _write(tmp_path / "snapshots/abc", {"cat/1.png": PNG, "cat/1.txt": "x"})
    (folder / "cat/2.png").symlink_to(secret)
    for options in ({"layout": "sidecars"}, {"layout": "classes", "template": "{label}"}):
        with pytest.raises(DataError, match="leads out of the folder"):
            _read(folder, **options)


def test_of_a_folder_of_several_layouts_the_table_is_read_or_the_choices_are_told(tmp_path):
    row = {"file_name": "cat/1.png", "text": "of the table"}
    _write(tmp_path, {"cat/1.png": PNG, "cat/1.txt": "of the file", "metadata.jsonl": _lines(row)})
    kept, _, said = _read(tmp_path)
    assert kept == {"cat/1.png": "of the table"} and "not read: sidecars (--layout=sidecars does)" in said
    assert _read(tmp_path, layout="metadata.jsonl")[0] == {"cat/1.png": "of the table"}
    kept, _, said = _read(tmp_path, layout="sidecars")
    assert kept == {"cat/1.png": "of the file"} and "not read: metadata.jsonl" in said
    assert _read(tmp_path, layout="classes", template="a {label}")[0] == {"cat/1.png": "a cat"}
    with pytest.raises(DataError, match=r"not laid out as metadata\.csv .*it has metadata\.jsonl, sidecars"):
        _read(tmp_path, layout="metadata.csv")
    with pytest.raises(DataError, match="--layout=tars does not go with a TFDS set"):
        open_source("tfds:digits", SourceOptions(layout="tars"))
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(DataError, match=r"2 ways .* choose with --layout=sidecars or --layout=classes"):
        _read(tmp_path, template="a {label}")


@pytest.mark.parametrize(
    "files, told",
    [
        ({"a.png": PNG}, "has 1 image, but no captions"),
        ({"a.txt": "x"}, r"no captioned images \(1 file\)"),
        ({"dataset_info.json": "{}", "state.json": "{}", "data-00000-of-00001.arrow": "x"}, "written by save_to_disk"),
        ({"dataset_dict.json": "{}", "train/data-00000-of-00001.arrow": "x"}, "written by save_to_disk"),
    ],
)
def test_a_folder_of_no_layout_is_told_what_is_understood(tmp_path, files, told):
    (tmp_path / "elsewhere").mkdir()
    folder = _write(tmp_path / "a", files)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=told) as error:
        _read(folder)
    text = str(error.value)
    assert "\n" not in text
    if "save_to_disk" not in told:
        assert all(layout.what in text for layout in LAYOUTS) and "folders (linked/, a link) are not followed" in text


def test_prepare_says_which_layout_it_reads(tmp_path, capsys):
    folder = _write(
        tmp_path / "a", {f"{i}.{end}": data for i in range(4) for end, data in (("png", IMAGES[i]), ("txt", f"{i}"))}
    )
    arguments = ["prepare", f"--source={folder}", f"--out={tmp_path / 'set'}", "--resolution=32", "--validation=0"]
    assert prepare.main(arguments) == 0
    assert f"source: images with a .txt or .caption of the same name beside each in {folder}" in capsys.readouterr().err
    records = PreparedSet(tmp_path / "set").records("train")
    assert [record["caption"].decode() for record in records] == list("0123")
    with pytest.raises(Exception, match="layout"):
        prepare.main([*arguments, "--layout=nonsense"])
    assert len(NAMES) == len(set(NAMES))
