import io
import json
import os
import tarfile
from collections import Counter

import numpy as np
import pytest

from shortcut_jax.data.images import decode
from shortcut_jax.data.records import DataSettings
from shortcut_jax.data.records import open_source as open_records
from shortcut_jax.errors import DataError
from shortcut_jax.preparation.inputs import Item, SourceOptions, open_source
from shortcut_jax.preparation.units import Unused
from tests.data.images import encoded, noise_image, simple_folder, write_folder


def _all(source):
    return [item for unit in source.units for item in source.items(unit)]


def _reasons(items):
    items = [item for item in items if not isinstance(item, Unused)]
    return Counter("kept" if isinstance(item, Item) else item.reason for item in items)


def _unused(items):
    return {item.what: item.number for item in items if isinstance(item, Unused)}


def _write_tar(path, members, keep=None):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
            else:
                info.type, info.linkname = data
            tar.addfile(info, io.BytesIO(data) if isinstance(data, bytes) else None)
    if keep is not None:
        path.write_bytes(path.read_bytes()[:keep])
    return path


PNG = encoded(noise_image())


def test_a_folder_is_rows_in_units(tmp_path):
    folder = simple_folder(tmp_path / "a", 10)
    source = open_source(str(folder), SourceOptions(unit=4))
    assert [unit.size for unit in source.units] == [4, 4, 2] and source.num_items == 10
    items = _all(source)
    assert [item.key for item in items] == [f"p/{i:03d}.png" for i in range(10)]
    assert [item.caption for item in items] == [f"image {i}" for i in range(10)]
    again = open_source(str(folder), SourceOptions(unit=4))
    assert again.fingerprint == source.fingerprint
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "p/000.jpg", "text": "t", "kind": "other", "n": 3}) + "\n")
    assert open_source(str(folder), SourceOptions()).fingerprint != source.fingerprint
    for where, count in ((("kind=base",), 10), (("kind=other",), 1), (("kind=other", "n=3"), 1)):
        assert open_source(str(folder), SourceOptions(where=where)).num_items == count
    with pytest.raises(DataError, match="no row for which kind=x"):
        open_source(str(folder), SourceOptions(where=("kind=x",)))
    with pytest.raises(DataError, match="field=value"):
        open_source(str(folder), SourceOptions(where=("kind",)))


def test_bad_rows_have_their_reason(tmp_path):
    good = {"good.png": (PNG, "a"), "long.png": (PNG, "x" * 10_001), "blank.png": (PNG, " ")}
    extra = [
        "not json",
        "[1]",
        b'{"file_name": "x.png", "prompt": "\xff"}',
        '{"file_name": "y.png", "prompt": "\\ud800"}',
        '{"prompt": "no name"}',
        '{"file_name": "z.png"}',
        '{"file_name": "z2.png", "prompt": 3}',
        '{"file_name": "./good.png", "prompt": "again"}',
        "",
    ]
    source = open_source(str(write_folder(tmp_path / "a", good, extra)), SourceOptions())
    assert _reasons(_all(source)) == {
        "kept": 1,
        "over-long caption": 1,
        "empty caption": 1,
        "bad JSON": 2,
        "not UTF-8": 2,
        "missing field": 3,
        "duplicate key": 1,
    }
    assert source.num_items == 11


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside.png", "p/../../outside.png", "link.png", "links/a.png"])
def test_rows_that_lead_outside_are_refused(tmp_path, name):
    outside = simple_folder(tmp_path / "outside", 1)
    row = json.dumps({"file_name": name, "prompt": "x"})
    folder = write_folder(tmp_path / "a", {"good.png": (PNG, "a")}, [row])
    (folder / "link.png").symlink_to(outside / "p/000.png")
    (folder / "links").symlink_to(outside)
    with pytest.raises(DataError, match=r"line 2.*leads out of the folder"):
        open_source(str(folder), SourceOptions())


def test_links_inside_the_folder_are_fine(tmp_path):
    folder = write_folder(tmp_path / "a", {"good.png": (PNG, "a")}, ['{"file_name": "link.png", "prompt": "b"}'])
    (folder / "link.png").symlink_to(folder / "good.png")
    assert _reasons(_all(open_source(str(folder), SourceOptions()))) == {"kept": 2}


def test_tars_are_units_of_neighbouring_members(tmp_path):
    members = [
        ("./001.txt", b" one "),
        ("./001.png", PNG),
        ("002.jpg", encoded(noise_image(), "JPEG")),
        ("002.json", b'{"caption": "two"}'),
        ("002.cls", b"7"),
        ("003.png", PNG),
        ("004.txt", b"four"),
        ("005.png", PNG),
        ("005.json", b"{"),
        ("006.png", PNG),
        ("006.json", b'{"other": 1}'),
        ("007.png", PNG),
        ("007.txt", b"\xff\xfe\xff"),
        ("008.png", PNG),
        ("008.txt", b""),
        ("001.png", PNG),
        ("001.txt", b"again"),
    ]
    for i in range(3):
        _write_tar(tmp_path / f"set-{i:02d}.tar", members)
    sources = [str(tmp_path), str(tmp_path / "*.tar"), str(tmp_path / "set-{00..02}.tar")]
    opened = [open_source(text, SourceOptions()) for text in sources]
    assert len({source.fingerprint for source in opened}) == 1
    source = opened[2]
    assert [unit.name for unit in source.units] == ["set-00", "set-01", "set-02"]
    items = list(source.items(source.units[1]))
    assert [(i.key, i.caption) for i in items if isinstance(i, Item)] == [("set-01/001", "one"), ("set-01/002", "two")]
    assert _reasons(items) == {
        "kept": 2,
        "missing caption": 1,
        "missing image": 1,
        "bad JSON": 1,
        "missing field": 1,
        "not UTF-8": 1,
        "empty caption": 1,
        "duplicate key": 1,
    }
    assert _unused(items) == {".cls files": 1}
    with pytest.raises(DataError, match=r"set-03\.tar, which is not found"):
        open_source(str(tmp_path / "set-{00..03}.tar"), SourceOptions())


def test_what_precedes_a_cut_in_a_tar_is_kept(tmp_path):
    pairs = [(f"{i}.{kind}", data) for i in range(3) for kind, data in (("png", PNG), ("txt", b"a caption"))]
    whole = _write_tar(tmp_path / "w.tar", pairs).read_bytes()
    with tarfile.open(tmp_path / "w.tar") as tar:
        starts = [member.offset_data for member in tar.getmembers()]
    last = starts[-1] + 512
    for keep, kept in ((starts[4] + 10, 2), (starts[4] - 100, 2), (starts[5] - 512, 2), (starts[2] + 5, 1), (last, 3)):
        (tmp_path / "w.tar").write_bytes(whole[:keep])
        source = open_source(str(tmp_path / "w.tar"), SourceOptions())
        assert _reasons(source.items(source.units[0])) == {"kept": kept, "truncated tar": 1}, keep
    garbage = whole[: starts[3] + 512] + b"x" * 5000
    (tmp_path / "w.tar").write_bytes(garbage)
    assert _reasons(source.items(source.units[0])) == {"kept": 2, "truncated tar": 1}
    (tmp_path / "w.tar").write_bytes(b"")
    assert _reasons(source.items(source.units[0])) == {"truncated tar": 1}


@pytest.mark.parametrize(
    "member",
    [
        ("/abs.png", PNG),
        ("a/../../b.png", PNG),
        ("link.png", (tarfile.SYMTYPE, "/etc/passwd")),
        ("hard.png", (tarfile.LNKTYPE, "1.png")),
        ("pipe.png", (tarfile.FIFOTYPE, "")),
    ],
)
def test_members_that_lead_outside_are_refused(tmp_path, member):
    path = _write_tar(tmp_path / "a.tar", [("1.png", PNG), ("1.txt", b"x"), member])
    with pytest.raises(DataError, match="nothing of this file was kept"):
        _all(open_source(str(path), SourceOptions()))


def test_a_tfds_set_gives_its_images_and_captions(data_dir, tmp_path):
    source = open_source("tfds:digits", SourceOptions(unit=1000, tfds_dir=data_dir))
    records = open_records(DataSettings(dir=data_dir))
    items = _all(source)
    assert len(items) == len(records) == source.num_items and [u.size for u in source.units] == [1000, 797]
    for item, record in zip(items[::300], records[::300], strict=True):
        np.testing.assert_array_equal(np.asarray(decode(item.image))[..., :1], record["image"])
        assert item.caption == record["caption"].decode()
    templated = SourceOptions(template="a {label}!", tfds_dir=data_dir)
    first = next(iter(open_source("tfds:digits:train", templated).items(source.units[0])))
    assert first.caption == f"a {records[0]['caption'].decode().split()[-1]}!"
    (version,) = (p.parent for p in (tmp_path / data_dir / "digits").glob("*/dataset_info.json"))
    for name in (str(version), f"tfds:{version}", f"tfds:{version}:train"):
        assert open_source(name, SourceOptions(unit=1000)).fingerprint == source.fingerprint
    for name, options, told in (
        ("tfds:digits:test", SourceOptions(tfds_dir=data_dir), "no split 'test': it has train"),
        ("tfds:digits", SourceOptions(template="{x}", tfds_dir=data_dir), "the fields are caption, label"),
        ("tfds:digits", SourceOptions(caption_field="x", tfds_dir=data_dir), "x is not found"),
        ("tfds:cifar10", SourceOptions(tfds_dir=data_dir), "not prepared.*tfds build cifar10"),
        ("tfds:digits", SourceOptions(where=("a=b",), tfds_dir=data_dir), "--where does not go with a TFDS set"),
    ):
        with pytest.raises(DataError, match=told):
            open_source(name, options)


def test_what_is_no_source_is_told(tmp_path):
    (tmp_path / "file.txt").write_text("x")
    os.mkfifo(tmp_path / "fifo")
    for text, told in (
        (str(tmp_path / "absent"), "was not found"),
        (str(tmp_path / "absent.tar"), "no such tar file"),
        (str(tmp_path), r"no captioned images \(1 file\)\. Understood are: .*metadata\.jsonl.*metadata\.csv.*parquet"),
        (str(tmp_path / "file.txt"), "no kind"),
        (str(tmp_path / "fifo"), "no kind"),
        ("gs://bucket/a.tar", "mount or copy"),
    ):
        with pytest.raises(DataError, match=told):
            open_source(text, SourceOptions())


def test_the_state_of_a_unit_is_that_of_its_rows(tmp_path):
    folder = simple_folder(tmp_path / "a", 6)
    states = lambda: [unit.state for unit in open_source(str(folder), SourceOptions(unit=2)).units]
    before, rows = states(), (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join([*rows[:2], rows[0], *rows[3:], "{}"]) + "\n")
    assert [a == b for a, b in zip(before, states(), strict=False)] == [True, False, True] and len(states()) == 4
    # The third row is a duplicate only because of the first one, in another unit.
    (folder / "metadata.jsonl").write_text("\n".join([*rows[1:3], rows[0], *rows[3:]]) + "\n")
    alone = states()[1]
    (folder / "metadata.jsonl").write_text("\n".join([*rows[:2], rows[0], *rows[3:]]) + "\n")
    assert alone != states()[1]


def test_of_a_list_of_captions_in_a_row_the_first_is_used(tmp_path):
    rows = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate((["a", "b", "c"], "d", []))]
    items = _all(open_source(str(write_folder(tmp_path / "a", {}, rows)), SourceOptions()))
    assert [(i.caption, i.further) for i in items[:2]] == [("a", 2), ("d", 0)] and items[2].reason == "empty caption"


def test_the_state_of_a_unit_of_sidecars_is_that_of_its_captions(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(PNG)
        (tmp_path / f"{i}.txt").write_text("a caption")
    states = lambda: [unit.state for unit in open_source(str(tmp_path), SourceOptions(unit=2)).units]
    before = states()
    (tmp_path / "3.txt").write_text("another caption")
    assert [a == b for a, b in zip(before, states(), strict=True)] == [True, False]
    assert states() == states()


def test_a_header_that_is_no_csv_is_told(tmp_path):
    (tmp_path / "metadata.csv").write_text('"file_name" x,text\n1.png,a\n')
    with pytest.raises(DataError, match=r"first line of .*metadata\.csv cannot be read as names of columns"):
        open_source(str(tmp_path), SourceOptions())
