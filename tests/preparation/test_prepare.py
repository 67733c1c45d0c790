import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

from shortcut_jax import cli, prepare
from shortcut_jax.data.format import PreparedSet
from shortcut_jax.errors import DataError, UsageError, UserError
from shortcut_jax.preparation import jobs
from shortcut_jax.preparation.inputs.folder import FolderSource
from tests.data.images import encoded, noise_image, simple_folder, write_folder


def _arguments(source, out, **changes):
    options = {"source": source, "out": out, "resolution": 32, "validation": 0.2} | changes
    return ["prepare", *(f"--{name}={value}" for name, value in options.items())]


def _bytes(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return simple_folder(tmp_path_factory.mktemp("source") / "images", 200)


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "set"
    assert prepare.main(_arguments(source, out, unit=20)) == 0
    return out


def test_tfds_opens_the_pixels_of_the_source(prepared):
    numbers = []
    for split in ("train", "validation"):
        for record in tfds.builder_from_directory(prepared).as_data_source(split):
            i = int(record["key"].decode()[2:5])
            np.testing.assert_array_equal(record["image"], noise_image(i))
            assert record["caption"].decode() == f"image {i}" and (record["height"], record["width"]) == (32, 32)
            numbers.append(i)
    assert sorted(numbers) == list(range(200))


def test_prepared_twice_is_the_same_and_the_third_time_is_told(source, prepared, tmp_path, capsys):
    out = tmp_path / "set"
    assert prepare.main(_arguments(source, out, unit=20)) == 0
    assert "left out" not in capsys.readouterr().err
    assert _bytes(out) == _bytes(prepared)
    assert prepare.main(_arguments(source, out, unit=20)) == 0
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"buckets: \['32x32'\] -> \['16x16'\]; unit: 20 -> 30"):
        prepare.main(_arguments(source, out, unit=30, resolution=16))


@pytest.mark.parametrize("which, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_stopped_in_the_middle_and_run_again_is_the_same(source, prepared, tmp_path, which, code):
    out = tmp_path / "set"
    slow = (  # so that the signal meets the work
        "import sys, time; from shortcut_jax import cli, prepare; from shortcut_jax.preparation import images\n"
        "read = images._read\n"
        "images._read = lambda *a: (time.sleep(0.02), read(*a))[1]\n"
        "cli.run(prepare.main, sys.argv[1:])"
    )
    command = [sys.executable, "-c", slow, *_arguments(source, out, unit=20)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    work = tmp_path / ".set.partial" / "work"
    while process.poll() is None and len(list(work.glob("[0-9]*.json"))) < 3:
        time.sleep(0.01)
    process.send_signal(which)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == code and not out.exists(), err
    if which != signal.SIGKILL:
        assert "of 10 units are done; rerun the same command to resume" in err and "Traceback" not in err
    before = {p.name: os.stat(p).st_mtime_ns for p in work.glob("[0-9]*.json")}
    assert 3 <= len(before) < 10
    assert prepare.main(_arguments(source, out, unit=20)) == 0
    assert _bytes(out) == _bytes(prepared)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_bad_images_are_counted_listed_and_bounded(tmp_path, capsys):
    images = {f"{i:03d}.png": (encoded(noise_image(i)), f"image {i}") for i in range(60)}
    whole = encoded(noise_image(1, 64, 64))
    frames = dict(save_all=True, append_images=[__import__("PIL.Image").Image.fromarray(noise_image(2))])
    bad = {
        "missing.png": (None, "x"),
        "truncated.png": (whole[:3000], "x"),
        "corrupt.png": (whole[:3000] + bytes(300) + whole[3300:], "x"),
        "empty.png": (b"", "x"),
        "page.png": (b"<html>", "x"),
        "moves.gif": (encoded(noise_image(), "GIF", **frames), "x"),
        "blank.png": (whole, ""),
        "small.png": (encoded(noise_image(3, 20, 20)), "x"),
    }
    folder = write_folder(tmp_path / "a", images | bad, ['{"file_name": "000.png", "prompt": "twice"}', "{"])
    with pytest.raises(DataError, match=r"more than --max_skipped=0\.1: 1 animated, 1 bad JSON, 1 corrupt, 1 dupl"):
        prepare.main(_arguments(folder, tmp_path / "set", max_skipped=0.1, enlarge="false"))
    assert not (tmp_path / "set").exists()
    assert prepare.main(_arguments(folder, tmp_path / "set", max_skipped=0.2, enlarge="false")) == 0
    info = PreparedSet(tmp_path / "set").info
    names = ("animated", "bad JSON", "corrupt", "duplicate key", "empty", "empty caption", "missing file")
    assert info.skipped == dict.fromkeys((*names, "too small", "truncated", "unsupported format"), 1)
    listed = [json.loads(line) for line in (tmp_path / "set/skipped.jsonl").read_text().splitlines()]
    assert {skip["key"]: skip["reason"] for skip in listed}["moves.gif"] == "animated" and len(listed) == 10
    capsys.readouterr()
    assert prepare.main(_arguments(folder, tmp_path / "enlarged", max_skipped=0.2)) == 0
    assert "1 of 61 images were smaller than their bucket and were enlarged" in capsys.readouterr().err


def test_a_set_that_ends_without_a_train_split_says_so(source, tmp_path, capsys):
    assert prepare.main(_arguments(source, tmp_path / "set", validation=1)) == 0
    assert "there is no train split, so nothing to train on" in capsys.readouterr().err


def test_a_corrected_source_is_read_again_to_the_bytes_of_a_clean_run(tmp_path, capsys):
    folder = simple_folder(tmp_path / "a", 40)
    good = (folder / "p/020.png").read_bytes()
    (folder / "p/020.png").write_bytes(good[:100])
    (folder / "p/021.png").unlink()
    os.mkfifo(folder / "p/021.png")
    (folder / "p/022.png").unlink()
    with pytest.raises(DataError, match=r"3 of 30 .*: 1 missing file, 1 not a file, 1 truncated; "):
        prepare.main(_arguments(folder, tmp_path / "set", unit=10))
    for i in (20, 21, 22):
        (folder / f"p/{i:03d}.png").unlink(missing_ok=True)
        (folder / f"p/{i:03d}.png").write_bytes(encoded(noise_image(i)))
    capsys.readouterr()
    assert prepare.main(_arguments(folder, tmp_path / "set", unit=10)) == 0
    told = capsys.readouterr().err
    assert "going on: 2 of 4 units are done" in told and "read again: 1 units" in told
    (tmp_path / "clean").mkdir()
    assert prepare.main(_arguments(folder, tmp_path / "clean/set", unit=10)) == 0
    assert _bytes(tmp_path / "set") == _bytes(tmp_path / "clean/set")


def test_an_image_that_was_read_and_is_replaced_is_read_again(tmp_path, monkeypatch):
    folder = simple_folder(tmp_path / "a", 40)
    (folder / "p/025.png").unlink()  # refused when three of four units are done
    with pytest.raises(DataError, match="1 of 30"):
        prepare.main(_arguments(folder, tmp_path / "set", unit=10))
    (folder / "p/025.png").write_bytes(encoded(noise_image(25)))
    (folder / "p/003.png").write_bytes(encoded(noise_image(103)))
    asked = []
    items = FolderSource.items
    monkeypatch.setattr(FolderSource, "items", lambda self, unit: asked.append(unit.index) or items(self, unit))
    assert prepare.main(_arguments(folder, tmp_path / "set", unit=10)) == 0
    assert asked == [0, 2, 3]
    (tmp_path / "clean").mkdir()
    assert prepare.main(_arguments(folder, tmp_path / "clean/set", unit=10)) == 0
    assert _bytes(tmp_path / "set") == _bytes(tmp_path / "clean/set")


def test_what_a_complete_set_left_out_and_was_corrected_is_told(tmp_path, capsys):
    folder = simple_folder(tmp_path / "a", 20)
    good = (folder / "p/003.png").read_bytes()
    for name, damaged in (("003", good[:100]), ("004", None), ("005", encoded(noise_image(5, 16, 16)))):
        (folder / f"p/{name}.png").unlink()
        if damaged:
            (folder / f"p/{name}.png").write_bytes(damaged)
    arguments = _arguments(folder, tmp_path / "set", max_skipped=0.5, enlarge="false")
    for _ in range(2):  # nothing has changed the second time
        assert prepare.main(arguments) == 0
    assert "is there already" in capsys.readouterr().err
    for name in ("003", "004", "005"):
        before = (folder / f"p/{name}.png").read_bytes() if name != "004" else None
        (folder / f"p/{name}.png").write_bytes(good)
        with pytest.raises(
            DataError, match=rf"set left out files that have changed since \(1: .*{name}\.png\): give another --out, or"
        ) as error:
            prepare.main(arguments)
        assert "\n" not in str(error.value)
        (folder / f"p/{name}.png").unlink()
        if before:  # with the stamp that it had
            listed = [json.loads(line) for line in (tmp_path / "set/skipped.jsonl").read_text().splitlines()]
            (stamped,) = (row["stamp"] for row in listed if row["file"].endswith(f"{name}.png"))
            (folder / f"p/{name}.png").write_bytes(before)
            os.utime(folder / f"p/{name}.png", ns=(0, int(stamped.split()[1])))
    assert prepare.main(arguments) == 0
    (tmp_path / "set/skipped.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"skipped\.jsonl is damaged"):
        prepare.main(arguments)


def test_a_replaced_tar_is_read_again_to_the_bytes_of_a_clean_run(tmp_path, capsys):
    def write(number, damaged=False):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for i in range(5):
                data = encoded(noise_image(10 * number + i))
                further = json.dumps({"text": ["a caption", "another"]}).encode()
                for name, content in ((f"{i}.v1.png", data[:99] if damaged else data), (f"{i}.v1.json", further)):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))

    for number in range(3):
        write(number, damaged=number == 1)
    source = str(tmp_path / "{0..2}.tar")
    with pytest.raises(DataError, match=r"5 of 15 .*: 5 truncated; "):
        prepare.main(_arguments(source, tmp_path / "set"))
    write(1)
    capsys.readouterr()
    assert prepare.main(_arguments(source, tmp_path / "set")) == 0
    told = capsys.readouterr().err
    assert "going on: 2 of 3 units" in told
    assert "not used: further captions of an image: the first one of a list is used (15)" in told
    (tmp_path / "clean").mkdir()
    assert prepare.main(_arguments(source, tmp_path / "clean/set")) == 0
    assert _bytes(tmp_path / "set") == _bytes(tmp_path / "clean/set")
    write(1, damaged=True)
    with pytest.raises(DataError, match="the source has changed since: give another --out"):
        prepare.main(_arguments(source, tmp_path / "set"))
    partly = _arguments(source, tmp_path / "partly", max_skipped=0.5)
    assert prepare.main(partly) == 0 == prepare.main(partly)
    os.utime(tmp_path / "1.tar", (1, 1))  # as where what was corrected has the same size
    with pytest.raises(DataError, match=r"left out files that have changed since \(1: .*1\.tar\)"):
        prepare.main(partly)


def test_sources_that_cannot_be_read_are_one_line(tmp_path, monkeypatch):
    """A failing disk, and folders that may not be read (which tests that run as root cannot have otherwise)."""
    folder = simple_folder(tmp_path / "a", 3)

    def fails(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(folder))

    with monkeypatch.context() as patch, pytest.raises(UsageError, match=r"--source=.*Permission denied$"):
        patch.setattr(jobs, "open_source", fails)
        prepare.main(_arguments(folder, tmp_path / "set"))
    with monkeypatch.context() as patch, pytest.raises(DataError, match=r"/a cannot be read: Permission denied; what"):
        patch.setattr(FolderSource, "items", fails)
        prepare.main(_arguments(folder, tmp_path / "set"))
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.read_bytes", fails)
        with pytest.raises(DataError, match="no record is left: 3 unreadable file were left out"):
            prepare.main(_arguments(folder, tmp_path / "set", max_skipped=1))
    assert prepare.main(_arguments(folder, tmp_path / "set", max_skipped=1)) == 0


def test_a_source_that_leads_outside_writes_nothing(tmp_path):
    folder = write_folder(tmp_path / "a", {}, ['{"file_name": "../x.png", "prompt": "x"}'])
    with pytest.raises(DataError, match="leads out of the folder"):
        prepare.main(_arguments(folder, tmp_path / "set"))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_buckets_by_aspect_and_prompts_of_a_file(tmp_path):
    sizes = [(64, 64), (48, 80), (80, 48), (96, 160)]
    images = {f"{i}.png": (encoded(noise_image(i, *size)), f"{i}") for i, size in enumerate(sizes)}
    folder = write_folder(tmp_path / "a", images)
    (tmp_path / "prompts.txt").write_text("first\n\nsecond\n")
    options = dict(buckets="aspect", resolution=64, validation=0, eval_prompts=tmp_path / "prompts.txt")
    assert prepare.main(_arguments(folder, tmp_path / "set", **options)) == 0
    opened = PreparedSet(tmp_path / "set")
    assert opened.info.buckets == ((48, 80), (64, 64), (80, 48)) and opened.info.counts == {"train": (2, 1, 1)}
    assert opened.info.eval_prompts == ("first", "second") and opened.info.enlarged == 0
    for record, bucket in zip(opened.records("train"), opened.buckets("train"), strict=True):
        assert record["image"].shape == (*opened.info.buckets[bucket], 3)


def test_the_digits_of_tfds(data_dir, tmp_path):
    arguments = _arguments("tfds:digits", tmp_path / "set", resolution=16, tfds_dir=data_dir)
    assert prepare.main(arguments) == 0
    info = PreparedSet(tmp_path / "set").info
    assert info.enlarged == sum(map(info.num_records, info.counts)) == 1797 and len(info.eval_prompts) == 10


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"validation": 2}, "is a share"),
        ({"unit": 0}, "at least 1"),
        ({"eval_prompts": "absent"}, "cannot be read"),
        ({"store": "latents"}, "--checkpoint is missing"),
    ],
)
def test_unfit_options_are_told(source, tmp_path, changes, told):
    with pytest.raises(UserError, match=told):
        prepare.main(_arguments(source, tmp_path / "set", **changes))
    assert not list(tmp_path.iterdir())


def test_the_caption_column_has_a_short_name():
    parse = lambda *argv: cli.parse(prepare.define_flags(), ["prepare", *argv], "usage")
    assert parse("--caption=text").caption_field == parse("--caption_field=text").caption_field == "text"
    with pytest.raises(UsageError, match="--caption_field is given 2 times"):
        parse("--caption=a", "--caption_field=b")
