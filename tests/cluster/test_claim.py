import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from shortcut_jax.cluster import claim, failures, key_value
from shortcut_jax.cluster.claim import CLAIM, Claim, Member, Times
from shortcut_jax.errors import ClaimError, FolderError

FAST = Times(interval=0.02, stale=0.3, patience=1.0, poll=0.005)


def _take(folder, **options):
    made = Claim(folder, **{"times": FAST, **options})
    with made:
        made.take()
        yield made


@pytest.fixture
def held(tmp_path):
    """A claim that a thread renews."""
    yield from _take(tmp_path)


def _fields(folder):
    """What a claim says, read until it is whole: its holder may be writing it at this moment."""
    until = time.monotonic() + 5
    while True:
        try:
            return json.loads((folder / CLAIM).read_text())
        except (FileNotFoundError, ValueError):
            if time.monotonic() > until:
                raise
        time.sleep(0.005)


def _write(folder, **fields):
    """The claim of somebody on another host."""
    theirs = {"host": "elsewhere", "pid": 7, "session": "theirs", "machine": "another", "started": "1", "renewals": 1}
    (folder / CLAIM).write_text(json.dumps({**theirs, "since": "noon", "renewed": "one", **fields}))


def _take_in_another_process(folder, then):
    """Its exit code."""
    take = f"import pathlib; from shortcut_jax.cluster.claim import Claim; Claim(pathlib.Path({str(folder)!r})).take()"
    return subprocess.run([sys.executable, "-c", f"{take}; {then}"]).returncode


def test_a_claim_tells_who_holds_it_is_renewed_and_goes(tmp_path):
    with Claim(tmp_path, times=FAST) as mine:
        assert not list(tmp_path.iterdir())
        mine.take()
        first = _fields(tmp_path)
        assert first["pid"] == os.getpid() and first["host"] and first["session"] and first["since"]
        until = time.monotonic() + 5
        while _fields(tmp_path)["renewals"] < 3 and time.monotonic() < until:
            time.sleep(0.01)
        assert _fields(tmp_path)["renewals"] >= 3 and _fields(tmp_path)["session"] == first["session"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_claim_goes_whatever_ends_the_work(error, tmp_path):
    with pytest.raises(error), Claim(tmp_path) as mine:
        mine.take()
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("held")
def test_a_folder_in_use_is_refused_at_once_naming_its_holder_and_nothing_is_touched(tmp_path):
    begin = time.monotonic()
    with pytest.raises(ClaimError) as refused, Claim(tmp_path, times=FAST):
        pytest.fail("entered")
    assert time.monotonic() - begin < FAST.stale
    line = str(refused.value)
    for part in (f"{tmp_path} is in use by process {os.getpid()} on ", "since 2", "last sign of life 2", "--workdir"):
        assert part in line
    assert "\n" not in line and refused.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == [CLAIM]


def test_the_claim_of_a_process_that_is_dead_is_taken_over_at_once(tmp_path, capfd):
    assert (
        _take_in_another_process(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)") == -signal.SIGKILL
    )
    left = _fields(tmp_path)
    begin = time.monotonic()
    with Claim(tmp_path) as mine:  # within far less than the seconds that a silent one has
        assert time.monotonic() - begin < 5 and not list(tmp_path.iterdir())
        mine.take()
        assert _fields(tmp_path)["session"] != left["session"]
    assert f"taking over {tmp_path} from process {left['pid']} on" in capfd.readouterr().err


def test_a_process_that_got_the_id_of_a_dead_holder_is_not_taken_for_it(tmp_path):
    _write(tmp_path, machine=claim._machine(), pid=os.getpid(), started="1")
    with Claim(tmp_path):
        assert not list(tmp_path.iterdir())


def test_a_holder_elsewhere_that_gives_no_sign_of_life_is_waited_for_then_taken_over(tmp_path, capfd):
    _write(tmp_path)
    begin = time.monotonic()
    with Claim(tmp_path, times=FAST):
        assert FAST.stale <= time.monotonic() - begin < FAST.patience
    waiting, over = capfd.readouterr().err.splitlines()
    assert waiting.startswith(f"waiting up to 0.3 s for {tmp_path}: process 7 on elsewhere (since noon, last sign of")
    assert over.startswith("taking over")


def test_the_clock_of_another_host_does_not_matter(tmp_path):
    """Dates of the far future or past: only a change of the file counts."""
    for when in ("2199-01-01", "1970-01-01"):
        _write(tmp_path, renewed=when)
        os.utime(tmp_path / CLAIM, (4e9, 4e9))
        with Claim(tmp_path, times=FAST):
            assert not list(tmp_path.iterdir())


def test_a_holder_that_is_ending_is_waited_for_while_it_lives(tmp_path, capfd):
    first = Claim(tmp_path, times=FAST)
    first.take()
    first.ending()
    while not _fields(tmp_path)["ending"]:
        time.sleep(0.005)
    threading.Timer(0.2, first.release).start()
    with Claim(tmp_path, times=FAST) as second:
        second.take()
        assert _fields(tmp_path)["session"] == second._session
    assert "is ending" in capfd.readouterr().err


def test_a_claim_that_is_being_written_is_read_again(tmp_path):
    """Half a claim does not say whether its holder is ending."""
    _write(tmp_path)
    whole = (tmp_path / CLAIM).read_text()
    looks = iter([whole, whole[:20], "", whole.replace("}", ', "ending": true}'), None])
    mine = Claim(tmp_path, times=FAST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claim, "_read", lambda _: next(looks))
        mine.__enter__()
    assert next(looks, "all read") == "all read"


def test_a_holder_that_never_ends_is_waited_for_within_bounds(tmp_path, held):
    held.ending()
    while not _fields(tmp_path)["ending"]:
        time.sleep(0.005)
    with pytest.raises(ClaimError, match=r"asked to stop, but has not ended within 0\.2 s") as refused:
        Claim(tmp_path, times=Times(0.02, 0.3, 0.2, 0.005)).__enter__()
    assert refused.value.exit_code == 75


def test_of_many_that_wait_for_one_claim_only_one_gets_it(tmp_path):
    _write(tmp_path)
    outcomes, barrier = [], threading.Barrier(8)

    def run():
        mine = Claim(tmp_path, times=FAST)
        mine.lost = lambda: outcomes.append("lost")
        barrier.wait()
        try:
            mine.__enter__()
            mine.take()
            outcomes.append(mine)
        except ClaimError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    time.sleep(5 * FAST.interval)
    assert len(outcomes) >= 8
    holders = [o for o in outcomes if isinstance(o, Claim)]
    assert len(holders) - outcomes.count("lost") == 1
    for holder in holders:
        holder.release()
    assert not list(tmp_path.iterdir())


def test_a_holder_whose_claim_was_taken_over_ends_and_leaves_the_other_one_alone(tmp_path, monkeypatch, capfd):
    ended = threading.Event()
    monkeypatch.setattr(failures, "end", lambda code: ended.set())
    first = Claim(tmp_path, times=FAST)
    first.take()
    os.remove(tmp_path / CLAIM)
    _write(tmp_path)
    assert ended.wait(5)
    error = capfd.readouterr().err
    assert f"error: {tmp_path} was taken over by process 7 on elsewhere" in error and error.count("\n") == 1
    first.release()
    assert _fields(tmp_path)["session"] == "theirs"


def test_a_claim_that_somebody_deleted_is_made_again(tmp_path, held):
    os.remove(held.path)
    assert _fields(tmp_path)["session"] == held._session


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\0\xff", '{"pid": "x", "machine": 3}'])
def test_a_claim_that_cannot_be_read_goes_stale_as_any_other(text, tmp_path):
    (tmp_path / CLAIM).write_text(text)
    with Claim(tmp_path, times=Times(0.01, 0.05, 1.0, 0.005)) as mine:
        mine.take()
        assert _fields(tmp_path)["session"] == mine._session


def test_a_claim_that_is_a_folder_is_one_line(tmp_path):
    (tmp_path / CLAIM).mkdir()
    with pytest.raises(FolderError, match="cannot read the claim"):
        Claim(tmp_path).__enter__()


def test_a_claim_is_given_up_by_a_process_that_ends_at_once(tmp_path):
    assert _take_in_another_process(tmp_path, "from shortcut_jax.cluster import failures; failures.end(75)") == 75
    assert not list(tmp_path.iterdir())


def test_process_0_claims_for_all_and_all_are_refused_together(tmp_path, monkeypatch):
    told = {}

    def gather(topic, text, timeout):
        told.setdefault("0", text)
        return {0: told["0"], 1: ""}

    monkeypatch.setattr(key_value, "num_processes", lambda: 2)
    monkeypatch.setattr(key_value, "gather", gather)
    for taken in (False, True):
        if taken:
            renew = lambda: [(_write(tmp_path, renewals=n), time.sleep(0.02)) for n in range(20)]
            threading.Thread(target=renew).start()
            while not (tmp_path / CLAIM).exists():
                time.sleep(0.001)
        told.clear()
        for index in (0, 1):
            monkeypatch.setattr(key_value, "process_id", lambda index=index: index)
            mine = Claim(tmp_path, times=FAST)
            if taken:
                with pytest.raises(ClaimError, match="in use by process 7 on elsewhere"):
                    mine.__enter__()
            else:
                mine.__enter__()
                mine.take()
                assert _fields(tmp_path)["renewals"] >= 1
                assert mine._held == (index == 0)
                if index == 0:
                    first = mine
        if not taken:
            first.release()
            assert not list(tmp_path.iterdir())


def _members(folder, group, *indices):
    path_of = lambda index: folder / f"claim-{index}.json"
    return [Claim(folder, "--out", Member(path_of(i), path_of(0), group), FAST) for i in indices]


def test_processes_of_one_group_share_a_folder_and_others_are_refused(tmp_path):
    ours = _members(tmp_path, "host:1 2", 0, 1)
    for mine in ours:
        mine.__enter__()
        mine.take()
    for theirs in (*_members(tmp_path, "host:1 4", 0, 1, 3), *_members(tmp_path, "host:1 2", 0, 1)):
        with pytest.raises(ClaimError, match="give another --out"):
            theirs.__enter__()
    for mine in ours:
        mine.release()
    assert not list(tmp_path.iterdir())
