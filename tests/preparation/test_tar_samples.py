"""Tar files as people have them: every member is used, left out with a reason, or counted as not used."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile

import pytest

from shortcut_jax.data.images import ENDINGS
from shortcut_jax.errors import DataError
from shortcut_jax.preparation.inputs import Item, SourceOptions, open_source
from shortcut_jax.preparation.units import Skip, Unused
from tests.data.images import encoded, noise_image

PNG = encoded(noise_image())


def _tar(path, members, pax=None):
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(data), pax or {}
            tar.addfile(info, io.BytesIO(data))
    return path


def _read(path, **options):
    """Keys and captions of what is kept, reasons by key of what is left out, and what is not used."""
    source = open_source(str(path), SourceOptions(**options))
    results = [item for unit in source.units for item in source.items(unit)]
    kept = {r.key.split("/", 1)[1]: r.caption for r in results if isinstance(r, Item)}
    left = [(r.key.split("/", 1)[-1], r.reason) for r in results if isinstance(r, Skip)]
    return kept, left, {r.what: r.number for r in results if isinstance(r, Unused)}


def _pair(stem, kind="png", caption=None):
    return [(f"{stem}.{kind}", PNG), (f"{stem}.txt", (caption or stem).encode())]


def _of(*names):
    """Members by name: images, or text that says the name."""
    return [(n, PNG if n.rpartition(".")[2].lower() in ENDINGS else n.encode()) for n in names]


@pytest.mark.parametrize("stem", ["img.v1", "photo 20.05.2024 3", "a.b.c/img.v1.final", ".hidden", "v1.0/x"])
def test_a_name_is_split_at_its_last_ending(tmp_path, stem):
    found = _read(_tar(tmp_path / "a.tar", [*_pair(stem), (f"{stem}2.jpg", PNG), (f"{stem}2.json", b'{"text": "t"}')]))
    assert found == ({stem: stem, f"{stem}2": "t"}, [], {})


def test_a_sample_and_others_whose_names_continue_its_name(tmp_path):
    members = [m for stem in ("img", "img.v1", "img.v2", "img.v10") for m in _pair(stem)]
    for order in (sorted(members), sorted(members, reverse=True), members):
        kept, left, unused = _read(_tar(tmp_path / "a.tar", order))
        assert (len(kept), left, unused) == (4, [], {})


def test_masks_and_the_like_beside_a_sample_are_not_used(tmp_path):
    names = ("1.depth.png", "1.jpg", "1.seg.json", "1.seg.png", "1.txt", "2.jpg", "2.seg.png", "2.txt", "2.vae.npy")
    found = _read(_tar(tmp_path / "a.tar", _of(*names)))
    expected = {".depth.png files": 1, ".seg.png files": 2, ".seg.json files": 1, ".npy files": 1}
    assert found == ({"1": "1.txt", "2": "2.txt"}, [], expected)
    # Without the sample that they would belong to, they are samples that lack something.
    kept, left, unused = _read(_tar(tmp_path / "a.tar", _of("1.depth.png", "2.seg.png", "2.seg.json")))
    assert (kept, left, unused) == ({}, [("1.depth", "missing caption"), ("2.seg", "bad JSON")], {})


def test_every_member_is_counted(tmp_path):
    names = ["a.jpg", "a.jpeg", "a.txt", "a.json", "a.cls", "README", "x.tar.zst", "._a.jpg", ".DS_Store", "b.cls"]
    names += ["__MACOSX/a.jpg", "p/Thumbs.db", ".png", "c.png", "d.txt", "e.jpg.bak", "no ending.é"]
    kept, left, unused = _read(_tar(tmp_path / "a.tar", _of(*names)))
    assert kept == {"a": "a.txt"} and left == [("c", "missing caption"), ("d", "missing image")]
    assert unused.pop("files of macOS or Windows (._*, .DS_Store, Thumbs.db)") == 4
    assert unused == {
        **{".cls files": 2, ".jpeg files": 1, ".json files": 1, ".zst files": 1, ".bak files": 1},
        "files without an ending": 3,
    }
    members = 2 + len(left) + 4 + sum(unused.values())
    assert members == len(names)
    _, _, unused = _read(_tar(tmp_path / "a.tar", _of(*(f"{i}.e{i:02d}" for i in range(30)))))
    assert len(unused) == 21 and unused["files of other kinds"] == 10


@pytest.mark.parametrize("ending", [*ENDINGS, "JPG"])
def test_a_tar_takes_the_images_that_a_folder_takes(tmp_path, ending):
    form = {"bmp": "BMP", "gif": "GIF", "tif": "TIFF", "tiff": "TIFF", "avif": "AVIF", "webp": "WEBP", "png": "PNG"}
    data = encoded(noise_image(), form.get(ending, "JPEG"))
    assert _read(_tar(tmp_path / "a.tar", [(f"1.{ending}", data), ("1.txt", b"x")])) == ({"1": "x"}, [], {})


def test_members_that_are_apart_are_said_to_be(tmp_path):
    images, texts = _of("a.jpg", "b.jpg", "c.jpg"), _of("c.txt", "b.txt", "a.txt")
    kept, left, unused = _read(_tar(tmp_path / "a.tar", [*images, *texts]))
    assert (kept, unused) == ({"c": "c.txt"}, {}) and left == [("b", "members apart"), ("a", "members apart")]
    again = [*_pair("a"), *_pair("b"), *_of("a.json"), *_pair("c"), *_pair("a")]
    assert _read(_tar(tmp_path / "a.tar", again)) == (
        {"a": "a", "b": "b", "c": "c"},
        [("a", "duplicate key")],
        {".json files": 1},
    )


@pytest.mark.parametrize("value, left", [(["one", "two"], None), ([], "empty caption"), ([3], "missing field")])
def test_of_a_list_of_captions_the_first_is_used(tmp_path, value, left):
    path = _tar(tmp_path / "a.tar", [("1.png", PNG), ("1.json", json.dumps({"caption": value}).encode())])
    source = open_source(str(path), SourceOptions())
    (item,) = source.items(source.units[0])
    assert item.reason == left if left else (item.caption, item.further) == ("one", 1)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.tar.xz", "a.tar.bz2"])
@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_tars_are_read_whatever_their_name(tmp_path, name, compress):
    plain = _tar(tmp_path / "plain", [*_pair("a"), ("x.npy", bytes(5000)), *_pair("b")]).read_bytes()
    (tmp_path / name).write_bytes(compress(plain))
    for source in (tmp_path / name, tmp_path):
        assert _read(source) == ({"a": "a", "b": "b"}, [], {".npy files": 1})
    (tmp_path / name).write_bytes(compress(plain)[:2000])
    assert _read(tmp_path / name)[1][-1][1] == "truncated tar"
    (tmp_path / name).write_bytes(compress(plain[:5632]))  # the end of a tar is missing in a whole file
    assert _read(tmp_path / name)[1][-1][1] == "truncated tar"


def test_zstd_is_refused_by_name(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    with pytest.raises(DataError, match="compressed with zstd, which is not read: decompress it first"):
        _read(tmp_path / "a.tar")


@pytest.mark.parametrize("size", ["-512", "-1536", "5000", "1000000000000", "4611686018427387904", "9" * 30])
def test_a_size_that_lies_is_one_damaged_tar(tmp_path, size):
    path = _tar(tmp_path / "a.tar", [("1.png", PNG), ("1.txt", b"x")], {"size": size})
    kept, left, _ = _read(path)
    assert kept == {} and [reason for _, reason in left] == ["truncated tar"]


def test_a_sparse_member_is_read(tmp_path):
    """As `tar --sparse` stores a file with holes: its size on the disk is not the one that it has."""
    import shutil
    import subprocess

    if not shutil.which("tar"):
        pytest.skip("no tar")
    with (tmp_path / "1.png").open("wb") as file:
        file.write(PNG)
        file.truncate(2**20)
    (tmp_path / "1.txt").write_text("x")
    subprocess.run(["tar", "--sparse", "-cf", "a.tar", "1.png", "1.txt"], cwd=tmp_path, check=True)
    assert (tmp_path / "a.tar").stat().st_size < 2**19
    assert _read(tmp_path / "a.tar") == ({"1": "x"}, [], {})


def test_what_lies_beside_the_tars_is_counted(tmp_path):
    _tar(tmp_path / "00.tar", _pair("a"))
    for name in ("00_stats.json", "00.parquet", "._00.tar", "sub/01.tar", "sub/x.jpg", ".b.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no tar")
    said = []
    source = open_source(str(tmp_path), SourceOptions(), said.append)
    assert [unit.name for unit in source.units] == ["00"]
    assert said[1] == "source: not read: 6 other files (00.parquet, 00_stats.json, sub/01.tar, ...)"
    open_source(str(tmp_path / "00.tar"), SourceOptions(), said.append)
    assert len(said) == 2


def test_braces_are_bounded_and_what_they_name_is_there(tmp_path):
    for i in (8, 9, 10):
        _tar(tmp_path / f"{i}.tar", _pair("a"))
    for text, told in (
        ("{0..99999999}.tar", "names 100,000,000 files, more than 1,000,000: narrow the braces"),
        ("{0..9999}-{0..9999}.tar", "names 100,000,000 files"),
        ("{8..12}.tar", r"names /.*/11\.tar, /.*/12\.tar, which are not found"),
        ("{10..2009}.tar", r"11\.tar, /.*/12\.tar, /.*/13\.tar and 1,996 more, which are not found"),
    ):
        with pytest.raises(DataError, match=told) as error:
            open_source(f"{tmp_path}/{text}", SourceOptions())
        assert len(str(error.value)) < 1000
    for text in ("{8..10}.tar", "{10..8}.tar", "{8,9,10}.tar", "{8..9}.tar"):
        assert len(open_source(f"{tmp_path}/{text}", SourceOptions()).units) == (2 if text == "{8..9}.tar" else 3)
    _tar(tmp_path / "{x}.tar", _pair("a"))
    assert len(open_source(f"{tmp_path}/{{x}}.tar", SourceOptions()).units) == 1


@pytest.mark.parametrize("how", ["named", "folder", "glob"])
@pytest.mark.parametrize("kind", ["FIFO", "device"])
def test_what_is_no_file_is_refused_without_being_opened(tmp_path, how, kind):
    _tar(tmp_path / "a.tar", _pair("a"))
    os.mkfifo(tmp_path / "b.tar") if kind == "FIFO" else os.symlink("/dev/zero", tmp_path / "b.tar")
    given = {"named": tmp_path / "b.tar", "folder": tmp_path, "glob": tmp_path / "*.tar"}[how]
    with pytest.raises(DataError, match=f"b.tar is a {kind}, not a tar file: take it out of the source"):
        open_source(str(given), SourceOptions())


def test_tars_that_cannot_be_read_are_told_before_the_work(tmp_path, monkeypatch):
    path = _tar(tmp_path / "b.tar", _pair("b"))
    with (
        monkeypatch.context() as patch,
        pytest.raises(DataError, match=r"b\.tar cannot be read: you have no permission"),
    ):
        patch.setattr(os, "access", lambda path, mode: False)  # for tests that run as root
        open_source(str(path), SourceOptions())
    os.symlink(tmp_path / "absent", tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"a\.tar cannot be read: No such file or directory"):
        open_source(str(tmp_path), SourceOptions())


def test_a_tar_without_members_says_nothing_of_images(tmp_path):
    assert _read(_tar(tmp_path / "a.tar", [])) == ({}, [], {})
