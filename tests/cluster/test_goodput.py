import pytest

from shortcut_jax.cluster.goodput import account, goodput_line, goodput_table


def _record(session, step, state="training", skipped=0.0, **seconds):
    return {"session": session, "step": step, "state": state, "seconds": seconds, "skipped": skipped}


def test_one_session_divides_its_wall_time_into_steps_and_the_rest():
    begin = _record(1000.0, 0, "starting", starting=2.0)
    end = _record(1000.0, 10, "finished", 3.0, starting=4.0, compiling=6.0, data=2.0, host=3.0, device=10.0, saving=5.0)
    a = account([begin, end])
    assert (a.sessions, a.wall, a.kept, a.skipped, a.lost, a.down) == (1, 30.0, 12.0, 3.0, 0.0, 0.0)
    assert a.goodput == pytest.approx(0.4)
    assert a.steps == {"data": 2.0, "host": 3.0, "device": 10.0}
    assert a.kept + a.skipped + a.lost + a.down + sum(a.others.values()) == a.wall


def test_steps_that_were_repeated_and_the_time_between_sessions_are_lost():
    records = [
        _record(1000.0, 0, "starting", starting=1.0),
        _record(1000.0, 20, starting=1.0, device=40.0),  # a checkpoint
        _record(1000.0, 25, starting=1.0, device=59.0),  # then it was killed, as its heartbeat tells
        _record(1100.0, 20, "starting", starting=1.0),
        _record(1100.0, 40, "finished", starting=1.0, restoring=2.0, device=37.0),
    ]
    a = account(records)
    assert a.sessions == 2
    assert a.lost == 19.0  # steps 21 to 25
    assert a.down == 40.0  # from 1060 to 1100
    assert a.kept == 40.0 + 37.0
    assert a.wall == 1.0 + 59.0 + 40.0 + 40.0


def test_a_step_between_two_records_lies_on_a_straight_line():
    records = [
        _record(0.0, 0, device=0.0),
        _record(0.0, 10, device=100.0),
        _record(100.0, 4, device=0.0),  # the checkpoint of step 4 was the newest that could be read
        _record(100.0, 10, "finished", device=60.0),
    ]
    assert account(records).lost == 60.0 and account(records).kept == 100.0


def test_falling_back_behind_an_earlier_session_loses_all_of_it():
    records = [
        *(_record(0.0, 0), _record(0.0, 10, "failed", device=10.0)),
        *(_record(10.0, 10), _record(10.0, 20, "failed", device=10.0)),
        *(_record(20.0, 5), _record(20.0, 20, "finished", device=15.0)),
    ]
    a = account(records)
    assert a.lost == 5.0 + 10.0 and a.kept == 5.0 + 15.0 and a.goodput == pytest.approx(20 / 35)


def test_time_after_a_finished_session_is_no_downtime():
    first = [_record(0.0, 0), _record(0.0, 10, "finished", device=10.0)]
    later = [_record(1e6, 10), _record(1e6, 12, "finished", device=2.0)]
    assert account([*first, *later]).down == 0.0
    assert account([first[0], {**first[1], "state": "interrupted"}, *later]).down == 1e6 - 10.0


def test_a_clock_that_went_back_gives_no_negative_time():
    records = [_record(1000.0, 0), _record(1000.0, 4, "failed", device=50.0), _record(1020.0, 4, device=1.0)]
    assert account(records).down == 0.0


def test_the_table_names_what_took_time_the_longest_first():
    a = account([_record(0.0, 0), _record(0.0, 9, "finished", 2.0, device=7200.0, data=60.0, sampling=140.0)])
    line, *rows = goodput_table(a).splitlines()
    assert (
        line == goodput_line(a) == "goodput 98.1%: 2 h 00 min of 2 h 03 min in training steps that were kept, 1 session"
    )
    assert [row.split("  ")[1] for row in rows[:2]] == ["training steps that were kept", "drawing sample grids"]
    assert not any("compiling" in row or "skipped" in row for row in rows)  # less than could be seen
    assert rows[-1] == "  all steps: 60.0 s waiting for data, 0.0 s on the host, 2 h 00 min waiting for devices"


def test_no_time_has_no_goodput():
    assert account([_record(0.0, 0)]).goodput == 0.0
    assert "goodput 0.0%" in goodput_table(account([_record(0.0, 0)]))
