from types import SimpleNamespace

import pytest

from shortcut_jax.cluster import timing
from shortcut_jax.cluster.timing import Stopwatch


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now.time)
    return now


def test_every_second_goes_to_the_innermost_kind_and_they_add_up(clock):
    watch = Stopwatch("starting")
    clock.time += 1
    with watch("host"):
        clock.time += 2
        with watch("data"):
            clock.time += 4
        clock.time += 8
        with pytest.raises(ValueError), watch("device"):
            clock.time += 16
            raise ValueError
        clock.time += 32
    clock.time += 64
    assert watch.seconds() == {"starting": 65, "host": 42, "data": 4, "device": 16}
    assert watch.step_seconds() == {"data": 4, "host": 42, "device": 16}
    assert sum(watch.seconds().values()) == 127


def test_the_kind_that_is_going_on_is_counted_up_to_now(clock):
    watch = Stopwatch("starting")
    assert watch.step_seconds() == {"data": 0, "host": 0, "device": 0}
    with watch("host"):
        clock.time += 3
        assert watch.seconds() == {"starting": 0, "host": 3}
