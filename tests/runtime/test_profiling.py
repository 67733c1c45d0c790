import jax
import pytest

from shortcut_jax.runtime.profiling import Profiler, parse_steps


@pytest.fixture
def traces(monkeypatch):
    """Calls of JAX's profiler, instead of the calls themselves."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: calls.append(("start", folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop",)))
    return calls


def _run(profiler, start, stop):
    """The steps that are traced in a run of steps `start + 1` to `stop`."""
    traced, running = [], False
    with profiler:
        for step in range(start + 1, stop + 1):
            if profiler.starts(step):
                profiler.start()
                running = True
            if running:
                traced.append(step)
            if profiler.stops(step):
                profiler.stop()
                running = False
    return traced


def test_a_window_is_a_slice_of_steps():
    assert list(parse_steps("10:13")) == [10, 11, 12]
    assert list(parse_steps("")) == []


@pytest.mark.parametrize(
    "text", ["10", "10:", "10:10", "13:10", "0:3", "-1:3", "a:b", "10-13", "1:2:3", "1.5:3", " 1:2"]
)
def test_what_is_no_window_is_told_with_an_example(text):
    with pytest.raises(ValueError, match="must be FIRST:END") as error:
        parse_steps(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [(0, 20, [5, 6, 7]), (4, 20, [5, 6, 7]), (5, 20, [6, 7]), (7, 20, []), (19, 20, []), (0, 5, [5]), (0, 4, [])],
)
def test_a_resumed_run_traces_what_is_left_of_the_window(start, stop, expected, traces, tmp_path):
    assert _run(Profiler(range(5, 8), tmp_path, start), start, stop) == expected
    folder = str(tmp_path / "process_00000")
    assert traces == ([("start", folder), ("stop",)] if expected else [])


def test_an_error_in_the_window_ends_the_trace(traces, tmp_path):
    profiler = Profiler(range(1, 9), tmp_path, 0)
    with pytest.raises(ZeroDivisionError), profiler:
        profiler.start()
        raise ZeroDivisionError
    assert [call[0] for call in traces] == ["start", "stop"]


def test_a_profile_that_cannot_be_made_stops_no_run(traces, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no profiler here")

    monkeypatch.setattr(jax.profiler, "start_trace", fails)
    assert _run(Profiler(range(1, 3), tmp_path, 0), 0, 4) and traces == []
    monkeypatch.undo()
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *args, **kwargs: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", fails)
    assert _run(Profiler(range(1, 3), tmp_path, 0), 0, 4)
