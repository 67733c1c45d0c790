import errno
import json
import threading
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

from shortcut_jax.data.format import PreparedSet
from shortcut_jax.data.images import encode_png
from shortcut_jax.errors import DataError
from shortcut_jax.preparation import units, writing
from shortcut_jax.preparation.job import Job
from shortcut_jax.preparation.units import Record, Skip, Unit, Unused, split_of
from shortcut_jax.preparation.writing import write_units
from tests.data.images import noise_image

BUCKETS = ((8, 8), (4, 16))


def _job(out, num=6, **changes):
    made = {
        "out": out,
        "request": {"source": "here", "sizes": BUCKETS},
        "store": "pixels",
        "buckets": BUCKETS,
        "units": [Unit(i, f"unit {i}", None) for i in range(num)],
        "validation": 0.3,
        "max_skipped": 1.0,
    }
    return Job(**(made | changes))


def _produce(unit, skips=0):
    for i in range(5):
        key, bucket = f"{unit.index}/{i}", (unit.index + i) % 2
        image = encode_png(noise_image(10 * unit.index + i, *BUCKETS[bucket]))
        told = {"key": key, "caption": f"caption {key}", "height": 9, "width": 9}
        yield Record(bucket, told | {"image": image}, {"enlarged": i % 2})
    for i in range(skips):
        yield Skip(f"{unit.index}/bad{i}", "corrupt", "it says")


def _bytes(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "set"
    write_units(_job(out), _produce)
    return out


def test_a_set_is_opened_by_tfds_with_every_record_once(whole):
    opened, keys = PreparedSet(whole), set()
    for split in ("train", "validation"):
        source = tfds.builder_from_directory(whole).as_data_source(split)
        assert len(source) == opened.info.num_records(split) > 0
        for record, bucket in zip(source, opened.buckets(split), strict=True):
            key = record["key"].decode()
            unit, i = map(int, key.split("/"))
            np.testing.assert_array_equal(record["image"], noise_image(10 * unit + i, *BUCKETS[bucket]))
            assert split_of(key, 0.3) == split and record["caption"].decode() == f"caption {key}"
            keys.add(key)
    assert len(keys) == 30 == sum(map(opened.info.num_records, ("train", "validation")))
    assert opened.info.enlarged == 12
    first = [r["caption"].decode() for r in opened.records("validation")][:16]
    assert list(opened.info.eval_prompts) == first


def test_the_same_again_is_the_same_bytes(whole, tmp_path):
    write_units(_job(tmp_path / "set"), _produce)
    assert _bytes(tmp_path / "set") == _bytes(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    write_units(_job(tmp_path / "set"), lambda unit: pytest.fail("it is there already"))


POINTS = ["serialize", "rename", "done file", "shard name", "metadata", "set aside"]


@pytest.mark.parametrize("point", POINTS)
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(whole, tmp_path, monkeypatch, point):
    class Killed(BaseException):
        pass

    def dying(function, calls):
        left = [calls]

        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*args, **kwargs)

        return call

    job, calls = _job(tmp_path / "set"), []

    def produce(unit):
        calls.append(unit.index)
        for i, record in enumerate(_produce(unit)):
            if point == "serialize" and (unit.index, i) == (3, 2):
                raise Killed
            yield record

    with monkeypatch.context() as patch, pytest.raises(Killed):
        path = type(tmp_path)
        if point == "rename":
            patch.setattr(units._Files, "finish", dying(units._Files.finish, 2))
        elif point == "done file":
            patch.setattr(units, "write_json", dying(units.write_json, 2))
        elif point == "shard name":
            patch.setattr(writing, "shard_name", dying(writing.shard_name, 3))
        elif point == "metadata":
            patch.setattr(writing, "write_set", dying(writing.write_set, 0))
        elif point == "set aside":
            rename = path.rename
            patch.setattr(path, "rename", lambda a, b: dying(rename, 0)() if b == job.out else rename(a, b))
        write_units(job, produce)
    assert not job.out.exists()
    before = {"serialize": 3, "rename": 2, "done file": 2}.get(point, 6)
    calls.clear()
    write_units(job, lambda unit: calls.append(unit.index) or _produce(unit))
    assert calls == list(range(before, 6))  # what was done is not done again
    assert _bytes(job.out) == _bytes(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_two_processes_write_what_one_does(whole, tmp_path):
    job, failures = _job(tmp_path / "set"), []

    def run(index):
        try:
            write_units(job, _produce, index, 2, poll_seconds=0.02)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and _bytes(job.out) == _bytes(whole)


def test_a_process_that_fails_is_not_waited_for(tmp_path):
    job = _job(tmp_path / "set")

    def fail(unit):
        raise DataError("the source is broken")
        yield

    def run():
        with pytest.raises(DataError):
            write_units(job, fail, 1, 2)

    other = threading.Timer(0.3, run)
    other.start()
    with pytest.raises(DataError, match="process 1 stopped: the source is broken"):
        write_units(job, _produce, 0, 2, poll_seconds=0.02)
    other.join()


def test_too_much_left_out_stops_with_a_summary_and_goes_on_when_allowed(tmp_path):
    skipping = lambda unit: _produce(unit, skips=unit.index == 5)
    with pytest.raises(
        DataError,
        match=r"1 of 31 \(3.2%\).*--max_skipped=0.03: 1 corrupt; they are listed in .*\(the first: 5/bad0: it says\)",
    ) as error:
        write_units(_job(tmp_path / "set", max_skipped=0.03), skipping)
    assert "\n" not in str(error.value) and not (tmp_path / "set").exists()
    listed = tmp_path / ".set.partial" / "skipped.jsonl"
    assert json.loads(listed.read_text()) == {"key": "5/bad0", "reason": "corrupt", "detail": "it says"}
    info = write_units(_job(tmp_path / "set", max_skipped=0.04), lambda unit: pytest.fail("all is done"))
    assert info.skipped == {"corrupt": 1}
    # Where all of much is bad, it is noticed long before the end.
    asked = []
    flood = lambda unit: asked.append(unit) or (Skip(f"{unit.index}/{i}", "empty") for i in range(100))
    with pytest.raises(DataError, match=r"100 of 100 \(100.0%\)"):
        write_units(_job(tmp_path / "flood", 50, max_skipped=0.05), flood)
    assert len(asked) == 1


def test_nothing_left_is_told(tmp_path):
    with pytest.raises(DataError, match=r"no record is left: 12 corrupt"):
        write_units(_job(tmp_path / "set"), lambda unit: (Skip(f"{unit.index}{i}", "corrupt") for i in range(2)))


def test_other_arguments_and_other_folders_are_refused(whole, tmp_path):
    with pytest.raises(DataError, match=r"other arguments \(source: here -> there\): give another --out"):
        write_units(_job(whole, request={"source": "there", "sizes": BUCKETS}), _produce)
    with pytest.raises(DataError, match="6 of 36"):
        write_units(_job(tmp_path / "set", max_skipped=0.01), lambda unit: iter([*_produce(unit, 1)]))
    with pytest.raises(DataError, match=r"\.set\.partial was prepared.*more: None -> 1"):
        write_units(_job(tmp_path / "set", request={"source": "here", "sizes": BUCKETS, "more": 1}), _produce)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("x")
    with pytest.raises(DataError, match="is no prepared set"):
        write_units(_job(tmp_path / "mine"), _produce)


def test_a_full_disk_is_one_line_and_keeps_what_is_done(whole, tmp_path, monkeypatch):
    job = _job(tmp_path / "set")
    write, left = units._Files.write, [12]

    def full(self, split, data):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, split, data)

    with monkeypatch.context() as patch, pytest.raises(DataError, match="no space is left on the disk") as error:
        patch.setattr(units._Files, "write", full)
        write_units(job, _produce)
    assert "\n" not in str(error.value)
    assert sorted(units.done_units(job.work)) == [0, 1] and not list(job.work.glob(".*"))
    write_units(job, _produce)
    assert _bytes(job.out) == _bytes(whole)
    with pytest.raises(DataError, match=r"needs at least 1000000\.0 GB"):
        write_units(_job(tmp_path / "huge", num_items=10**6, bytes_per_record=10**9), _produce)


def test_a_second_command_on_the_same_set_is_refused(tmp_path):
    job = _job(tmp_path / "set")

    def produce(unit):
        with pytest.raises(DataError, match="another command is writing"):
            write_units(job, _produce)
        yield from _produce(unit)

    write_units(job, produce)


def test_the_hooks_of_latents_are_called_once(tmp_path):
    prompts, sums = [], []

    def texts(captions):
        prompts.append(tuple(captions))
        return {"txt": np.zeros((3, 2, 2), np.float32), "vec": np.zeros((3, 2), np.float32)}

    def complete(folder, total):
        sums.append(dict(total))
        (folder / "vae").mkdir(exist_ok=True)
        return {"encoders": {"vae": {"origin": "here", "content": "abc"}}}

    job = _job(tmp_path / "set", eval_prompts=("a", "b"), prompts=texts, complete=complete)
    info = write_units(job, _produce)
    assert prompts == [("a", "b")] and sums == [{"enlarged": 12}] and info.encoders["vae"]["content"] == "abc"
    assert (job.out / "vae").is_dir() and PreparedSet(job.out).prompts().keys() == {"", "a", "b"}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_split_may_have_everything(tmp_path, share):
    info = write_units(_job(tmp_path / "set", validation=share), _produce)
    assert info.num_records("validation") == (30 if share else 0) and len(info.eval_prompts) == 16


def _outcomes(job, produce):
    """Which units are asked for, and the set's bytes."""
    asked = []
    write_units(job, lambda unit: asked.append(unit.index) or produce(unit))
    return asked, _bytes(job.out)


def _units(states):
    return [Unit(i, f"unit {i}", None, state) for i, state in enumerate(states)]


def test_after_a_refusal_units_that_left_something_out_are_read_again(whole, tmp_path):
    skipping = lambda unit: _produce(unit, skips=unit.index in (1, 4))
    job = _job(tmp_path / "set", max_skipped=0.05)
    for _ in range(2):
        with pytest.raises(DataError, match=r"2 of 32.*correct the source and run this again"):
            write_units(job, skipping)
    assert _outcomes(job, _produce) == ([1, 4], _bytes(whole))
    # Where no run was refused, they are kept: work that is often interrupted comes to an end.
    job = _job(tmp_path / "other", max_skipped=0.9)
    with pytest.raises(RuntimeError):
        write_units(job, lambda unit: _break() if unit.index == 5 else skipping(unit))
    assert _outcomes(job, skipping)[0] == [5]


def _break():
    raise RuntimeError("interrupted")


def test_units_whose_source_changed_are_read_again(tmp_path):
    request = lambda fingerprint: {"source": "here", "fingerprint": fingerprint}
    made = lambda name, states, **changes: _job(
        tmp_path / name, request=request("".join(states)), units=_units(states), **changes
    )
    with pytest.raises(RuntimeError):
        write_units(made("set", "abcdef"), lambda unit: _break() if unit.index == 5 else _produce(unit))
    clean = _outcomes(made("clean/set", "abXde"), _produce)[1]  # a file was replaced, and the last one taken away
    assert _outcomes(made("set", "abXde"), _produce) == ([2], clean)
    with pytest.raises(DataError, match="the source has changed since: give another --out, or delete"):
        write_units(made("set", "abXdY"), _produce)


def test_units_of_a_version_that_knew_no_states_are_kept_where_the_source_is_the_same(tmp_path):
    request = lambda fingerprint: {"source": "here", "fingerprint": fingerprint}
    made = lambda fingerprint: _job(tmp_path / "set", request=request(fingerprint), units=_units("abcdef"))
    with pytest.raises(RuntimeError):
        write_units(made("f"), lambda unit: _break() if unit.index == 5 else _produce(unit))
    for path in made("f").work.glob("[0-9]*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"state": ""}))
    assert writing.stale_units(made("f")) == set() and writing.stale_units(made("other")) == set(range(5))


@pytest.mark.parametrize("function", ["write_set", "shard_name"])
def test_a_source_that_changed_while_the_set_was_completed(tmp_path, monkeypatch, function):
    made = lambda name, states: _job(tmp_path / name, units=_units(states))
    original, calls = getattr(writing, function), []

    def fail(*args):
        calls.append(args)
        return _break() if function == "write_set" or len(calls) == 10 else original(*args)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(writing, function, fail)
        write_units(made("set", "abcdef"), _produce)
    asked, found = _outcomes(made("set", "abXd"), _produce)  # of which other shards get their names
    assert asked == [2] and found == _outcomes(made("clean/set", "abXd"), _produce)[1]


def test_a_unit_is_read_again_when_a_file_that_it_left_out_changes(whole, tmp_path):
    bad, absent, locked = (tmp_path / name for name in ("bad", "absent", "locked"))
    bad.write_bytes(b"bad")

    def produce(unit):
        yield from _produce(unit)
        if unit.index < 2:
            path = (bad, absent)[unit.index]
            if path.read_bytes() != b"good" if path.exists() else True:
                yield Skip(f"{unit.index}/x", "corrupt", "", (str(path), units.stamp(path)))
        if unit.index == 2 and not locked.exists():
            yield Skip("2/x", "unreadable file", "", (str(bad), ""))

    job = _job(tmp_path / "set")
    interrupted = lambda unit: _break() if unit.index == 5 else produce(unit)
    with pytest.raises(RuntimeError):
        write_units(job, interrupted)
    assert writing.stale_units(job) == {2} and writing.units_done(job, {2}) == 4
    for path in (bad, absent, locked):
        path.write_bytes(b"good")
    assert writing.stale_units(job) == {0, 1, 2}
    assert _outcomes(job, produce) == ([0, 1, 2, 5], _bytes(whole))


def test_files_of_records_and_of_names_that_are_not_utf8_are_watched(whole, tmp_path):
    paths = {name: str(tmp_path / name) for name in ("read", "bad\udcff")}
    for path in paths.values():
        with open(path, "wb") as file:
            file.write(b"x")

    def produce(unit):
        for record in _produce(unit):
            yield record._replace(watched=(paths["read"], units.stamp(paths["read"]))) if unit.index == 1 else record
        if unit.index == 2:
            yield Skip("2/x", "corrupt", "", (paths["bad\udcff"], units.stamp(paths["bad\udcff"])))

    job = _job(tmp_path / "set")
    with pytest.raises(RuntimeError):
        write_units(job, lambda unit: _break() if unit.index == 5 else produce(unit))
    assert writing.stale_units(job) == set()
    for name, unit in (("read", 1), ("bad\udcff", 2)):
        with open(paths[name], "wb") as file:
            file.write(b"longer")
        assert unit in writing.stale_units(job)
    said = []
    write_units(job, produce, say=said.append)
    assert said[0] == "going on: 3 of 6 units are done" and said[1].startswith("read again: 2 units")
    with open(paths["bad\udcff"], "wb") as file:
        file.write(b"of another length")
    with pytest.raises(DataError, match=r"left out files that have changed since \(1: .*bad\\udcff\)"):
        write_units(job, _produce)


def test_a_process_waits_for_the_units_that_another_one_reads_again(whole, tmp_path, monkeypatch):
    made = lambda states: _job(tmp_path / "set", units=_units(states))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):  # when all units are done
        patch.setattr(writing, "_complete", lambda *_: _break())
        write_units(made("abcdef"), _produce)
    threads = [
        threading.Thread(target=write_units, args=(made("abcYef"), _produce, index, 2, 0.02)) for index in range(2)
    ]
    threads[0].start()
    time.sleep(0.2)
    assert threads[0].is_alive() and not (tmp_path / "set").exists()
    threads[1].start()
    for thread in threads:
        thread.join(30)
    assert _bytes(tmp_path / "set") == _bytes(whole)


def test_what_is_not_used_is_counted(tmp_path):
    def produce(unit):
        yield from _produce(unit)
        yield Unused(".cls files", 2)

    job = _job(tmp_path / "set")
    info = write_units(job, produce)
    assert info.unused == {".cls files": 12} == PreparedSet(job.out).info.unused
    with pytest.raises(DataError, match=r"no record is left: not used: \.cls files \(6\)$"):
        write_units(_job(tmp_path / "other"), lambda unit: iter([Unused(".cls files", 1)]))
    with pytest.raises(DataError, match="no record is left: the source has no images"):
        write_units(_job(tmp_path / "third"), lambda unit: iter([]))
