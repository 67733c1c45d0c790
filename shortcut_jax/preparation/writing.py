"""Writing a set: unit by unit in a folder beside it, which gets the set's name when everything is there.

Whatever stops the work, even in the middle of a write, the same command resumes from the units that are done and ends
with the same bytes. Several processes share the units and a file system; process 0 completes the set.
"""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_jax.data.format import (
    INFO,
    SPLITS,
    SetInfo,
    Shard,
    dataset_name,
    read_info,
    set_features,
    shard_name,
    write_set,
)
from shortcut_jax.errors import DataError
from shortcut_jax.preparation.job import Job, Produce
from shortcut_jax.preparation.left_out import REFUSED, check_left_out, check_skipped, list_skipped, mark_refused
from shortcut_jax.preparation.progress import Tally, progress_bar, remedies, skipped_text, unused_text
from shortcut_jax.preparation.units import (
    Done,
    Unit,
    counts,
    done_path,
    done_units,
    files_of,
    files_path,
    has_changed,
    read_done,
    records_path,
    serializer,
    write_json,
    write_unit,
)

REQUEST = "request.json"
FINGERPRINT = "fingerprint"
"""Of the source, in a request: another one concerns the units that changed, and only a complete set as a whole."""


def already_written(job: Job) -> bool:
    """Whether the set is there.

    Raises:
      DataError: `out` is something else, or it or its unfinished folder was asked for with other arguments, or a file
        that the set left out is another one now.
    """
    out = job.out
    if (out / INFO).is_file():
        info = read_info(out)
        _check_same(out, info.request, job.request)
        check_left_out(out)
        return True
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"--out={out} is there and is no prepared set: give another --out")
    for path in (job.work / REQUEST, job.partial / INFO):
        if path.is_file():
            stored = _stored_request(path)
            # Units whose part of the source changed are read again: see `stale_units`.
            asked = {**job.request, FINGERPRINT: stored.get(FINGERPRINT)} if job.work.is_dir() else job.request
            _check_same(job.partial, stored, asked)
    return False


def write_units(
    job: Job,
    produce: Produce,
    process_index: int = 0,
    process_count: int = 1,
    poll_seconds: float = 1.0,
    say: Callable[[str], None] = lambda line: None,
) -> SetInfo:
    """Writes a set, or the rest of one, and returns what it is. Process i of n writes units i, i + n, ...

    Args:
      job: the set.
      produce: the records of a unit, and what is left out; the same ones whenever it is called.
      process_index: i.
      process_count: n.
      poll_seconds: how often a process that has nothing left to do looks at what the others did.
      say: takes a line of what was done before.

    Raises:
      DataError: see `already_written`; too much was left out, nothing is left, the disk is full, or another process
        works on it or failed.
    """
    if already_written(job):
        return read_info(job.out)
    started = time.time()
    with _failures_told(job, process_index):
        if not (job.partial / INFO).is_file() or job.work.is_dir():
            _check_space(job)
            job.work.mkdir(parents=True, exist_ok=True)
            write_json(job.work / REQUEST, job.request)
            with _locked(job, process_index):
                tally = _write_all(job, produce, process_index, process_count, poll_seconds, started, say)
                if process_index == 0:
                    _complete(job, tally)
        if process_index == 0:
            _rename(job)
    while process_index and not (job.out / INFO).is_file():
        _check_others(job, process_index, started)
        time.sleep(poll_seconds)
    return read_info(job.out)


def _write_all(
    job: Job, produce: Produce, index: int, count: int, poll: float, started: float, say: Callable[[str], None]
) -> Tally:
    serialize = serializer(set_features(job.store, job.text, job.latents))
    for left in (*job.work.glob(".*.tmp"),) if count == 1 else ():
        left.unlink(missing_ok=True)
    (job.work / f"stopped-{index}").unlink(missing_ok=True)
    stale = stale_units(job)
    if done := units_done(job, stale):
        say(f"going on: {done:,} of {len(job.units):,} units are done")
    if stale:
        say(f"read again: {len(stale):,} units whose source has changed, or that left out too much before")
    _drop(job, {i for i in stale if i % count == index})
    tally = Tally(job.work, len(job.units), job.num_items, {i for i in stale if i % count != index})
    tally.refresh()
    check_skipped(job, tally)
    with progress_bar(tally, index == 0) as bar:
        for unit in job.units[index::count]:
            if unit.index in tally.done:
                continue
            unit = unit._replace(state=_state(job, unit))
            for state in write_unit(job.work, unit, produce(unit), serialize, job.validation):
                bar.show(state)
            tally.refresh()
            bar.show(None)
            check_skipped(job, tally)
        while len(tally.done) < len(job.units):
            _check_others(job, index, started)
            time.sleep(poll)
            if not job.work.is_dir():  # process 0 saw the last unit first, and is done
                return tally
            tally.refresh()
            bar.show(None)
    check_skipped(job, tally)
    if not tally.records:
        raise DataError(_nothing_left(job, tally))
    return tally


def stale_units(job: Job) -> set[int]:
    """The units that are done and have to be read again.

    Those are the units whose part of the source, or a file that they read or left out, is another one now, and, where a
    run ended because too much was left out, the units of that time that left anything out, unless more is tolerated
    now.
    """
    refused = job.work / REFUSED
    since = 0
    if refused.is_file() and json.loads(refused.read_text(encoding="utf-8")) >= job.max_skipped:
        since = refused.stat().st_mtime_ns
    units = {unit.index: unit for unit in job.units}
    return {i for i in done_units(job.work) if i not in units or _is_stale(job, units[i], since)}


def _is_stale(job: Job, unit: Unit, refused: int) -> bool:
    done = read_done(job.work, unit.index)
    if done.name != unit.name:
        return True
    if not done.state:  # of a version that knew the state of the whole source only
        if _stored_request(job.work / REQUEST).get(FINGERPRINT) != job.request.get(FINGERPRINT):
            return True
    elif done.state != _state(job, unit):
        return True
    if done.skipped and done_path(job.work, unit.index).stat().st_mtime_ns <= refused:
        return True
    watched = {(skip.watched[0], skip.watched[1]) for skip in done.skipped if skip.watched}
    return any(has_changed(*file) for file in itertools.chain(watched, files_of(files_path(job.work, unit.index))))


def _state(job: Job, unit: Unit) -> str:
    return unit.state or str(job.request.get(FINGERPRINT, ""))


def _drop(job: Job, indices: set[int]) -> None:
    """Makes units as if they had not been done; shards that have their names already are units again before."""
    if not indices:
        return
    for written, path in _named(job, [(i, read_done(job.work, i)) for i in sorted(done_units(job.work))]):
        with contextlib.suppress(FileNotFoundError):  # as it is where the set was not being completed
            path.rename(written)
    for index in indices:
        done_path(job.work, index).unlink(missing_ok=True)
        files_path(job.work, index).unlink(missing_ok=True)
        for split in SPLITS:
            records_path(job.work, index, split).unlink(missing_ok=True)


def _named(job: Job, outcomes: Sequence[tuple[int, Done]]) -> Iterator[tuple[Path, Path]]:
    """The records of units that are done, and the shards that they become when these are all units."""
    name = dataset_name(job.out)
    for split in SPLITS:
        held = [index for index, done in outcomes if done.buckets[split]]
        for i, index in enumerate(held):
            yield records_path(job.work, index, split), job.partial / shard_name(name, split, i, len(held))


def _nothing_left(job: Job, tally: Tally) -> str:
    refused = f"{skipped_text(tally.skipped)} were left out, listed in {list_skipped(job)}" if tally.skipped else ""
    mark_refused(job)
    unused = _unused(job, tally)
    told = "; ".join(filter(None, [refused, f"not used: {unused_text(unused)}" if unused else ""]))
    return f"no record is left: {told or 'the source has no images'}{remedies(tally.skipped)}"


def _unused(job: Job, tally: Tally) -> dict[str, int]:
    return dict(sorted((Counter(job.unused) + Counter(tally.unused)).items()))


def _complete(job: Job, tally: Tally) -> None:
    """Names the shards and writes everything beside them; done again from the start if it is interrupted."""
    name = dataset_name(job.out)
    outcomes = [(unit.index, read_done(job.work, unit.index)) for unit in job.units]
    names = dict(_named(job, outcomes))
    shards: dict[str, list[Shard]] = {}
    for split in SPLITS:
        for index, done in outcomes:
            written = records_path(job.work, index, split)
            if written not in names:
                continue
            if written.exists():
                written.rename(names[written])
            shard = Shard(names[written], np.array(done.buckets[split], np.uint16), done.num_bytes[split])
            shards.setdefault(split, []).append(shard)
    list_skipped(job)
    chosen = job.eval_prompts
    if chosen is None:
        split = "validation" if "validation" in shards else "train"
        captions = dict.fromkeys(caption for _, done in outcomes for caption in done.captions[split])
        chosen = tuple(captions)[:16]
    further = job.complete(job.partial, tally.sums) if job.complete else {}
    fields: dict[str, Any] = {
        "store": job.store,
        "buckets": job.buckets,
        "counts": {
            split: counts((b for s in parts for b in s.buckets), len(job.buckets)) for split, parts in shards.items()
        },
        "request": job.request,
        "skipped": dict(sorted(tally.skipped.items())),
        "enlarged": int(tally.sums.get("enlarged", 0)),
        "unused": _unused(job, tally),
        "text": job.text,
        "latents": job.latents,
        "encoders": job.encoders,
        "eval_prompts": chosen,
    }
    info = SetInfo(**(fields | further))
    write_set(job.partial, name, info, shards, job.prompts(chosen) if job.prompts else None)


def _rename(job: Job) -> None:
    """Gives a complete set its name. Its work is set aside first: half of it would look like units to be done."""
    aside = job.partial.with_name(f"{job.partial.name}.done")
    if job.work.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
        job.work.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
    job.partial.rename(job.out)


def _check_space(job: Job) -> None:
    folder = next(p for p in job.out.absolute().parents if p.exists())
    finished = sum(p.stat().st_size for p in job.work.glob("*.array_record"))
    needed, free = (job.num_items or 0) * job.bytes_per_record - finished, shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(f"--out={job.out} needs at least {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free there")


def _stored_request(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}  # a set.json that was being written
    return stored["request"] if path.name == INFO else stored


def _check_same(folder: Path, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    asked = json.loads(json.dumps(asked))  # as it is stored: tuples are lists
    names = [n for n in sorted({*stored, *asked}) if stored and stored.get(n) != asked.get(n)]
    if names == [FINGERPRINT]:
        raise DataError(
            f"{folder} was prepared from this source as it was before, and the source has changed since: give another "
            f"--out, or delete {folder}, to prepare it as it is now"
        )
    if names:
        told = "; ".join(f"{n}: {stored.get(n)} -> {asked.get(n)}" for n in names)
        raise DataError(f"{folder} was prepared with other arguments ({told}): give another --out, or delete it")


def _check_others(job: Job, index: int, started: float) -> None:
    for path in job.work.glob("stopped-*"):
        with contextlib.suppress(FileNotFoundError):
            if path.name != f"stopped-{index}" and path.stat().st_mtime > started:
                raise DataError(
                    f"process {path.name.split('-')[1]} stopped: {path.read_text(encoding='utf-8').strip()}"
                )


@contextlib.contextmanager
def _failures_told(job: Job, index: int) -> Iterator[None]:
    """Tells the other processes of a failure, and turns a full disk into one line."""
    try:
        yield
    except Exception as error:
        message = str(error)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in message:
            message = (
                f"no space is left on the disk of {job.partial}; what is done is kept: free some, and run this again"
            )
        if job.work.is_dir():
            with contextlib.suppress(OSError):
                (job.work / f"stopped-{index}").write_text(message, encoding="utf-8")
        if message != str(error):
            raise DataError(message) from error
        if isinstance(error, OSError):
            raise DataError(f"{job.out} cannot be written: {message}") from error
        raise


@contextlib.contextmanager
def _locked(job: Job, index: int) -> Iterator[None]:
    """Two commands with the same `--out` would write into each other's files."""
    with (job.work / f"lock-{index}").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another command is writing {job.out}: wait for it, or stop it") from error
        except OSError:
            pass  # a file system without locks
        yield


def captions_hash(captions: Sequence[str] | None) -> str:
    """What a file of captions holds, for a request; a set that has none chooses its own."""
    if captions is None:
        return "of the set"
    return hashlib.sha256(json.dumps(captions).encode()).hexdigest()


def units_done(job: Job, stale: Set[int] = frozenset()) -> int:
    """How many units are done, those not counted that have to be read again."""
    return sum(unit.index not in stale and done_path(job.work, unit.index).is_file() for unit in job.units)
