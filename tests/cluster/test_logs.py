import asyncio
import gc
import io
import logging
import re
import sys
import threading

import jax
import pytest
from absl import logging as absl_logging

from shortcut_jax.cluster import key_value
from shortcut_jax.cluster.distributed import say
from shortcut_jax.cluster.logs import LOGGER, Prefixed, log_file, mark_stderr, process_log


def _lines(workdir, index=0):
    return log_file(workdir, index).read_text().splitlines()


def test_what_is_said_is_printed_once_and_logged_with_time_index_and_level(tmp_path, capfd):
    with process_log() as log_in:
        say("before the folder is known")
        log_in(tmp_path)
        say("\ntwo\nlines")
        LOGGER.warning("beware of %s", "this")
        logging.getLogger("a.library").warning("old")
        logging.getLogger("a.library").info("not even mentioned")
    say("too late")
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} process 0"
    lines = _lines(tmp_path)
    texts = ["INFO before the folder is known", "INFO two", "INFO lines", "WARNING beware of this", "WARNING old"]
    assert len(lines) == len(texts)
    for line, text in zip(lines, texts, strict=True):
        assert re.fullmatch(f"{stamp} {text}", line), line
    err = capfd.readouterr().err
    assert err.count("before the folder") == err.count("two\nlines") == err.count("beware of this") == 1


def test_nothing_is_written_before_the_folder_is_known(tmp_path):
    with process_log():
        say("a word")
    assert not list(tmp_path.iterdir())


def test_an_exception_is_logged_with_its_traceback_and_goes_on(tmp_path, capfd):
    with pytest.raises(ValueError, match="broken"), process_log() as log_in:
        log_in(tmp_path)
        raise ValueError("broken")
    lines = _lines(tmp_path)
    assert "ERROR ValueError: broken" in lines[0] and "Traceback" in lines[1] and "test_logs.py" in "".join(lines)
    assert "broken" not in capfd.readouterr().err  # whoever catches it prints it


def test_other_processes_log_what_process_0_says_and_mark_their_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 12)
    monkeypatch.setattr(key_value, "process_id", lambda: 12)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    mark_stderr()
    mark_stderr()  # once is enough
    with process_log() as log_in:
        log_in(tmp_path)
        say("in step")
        LOGGER.warning("out of step")
        print("plain", file=sys.stderr)
    assert stream.getvalue() == "[process 12] out of step\n[process 12] plain\n"
    assert [line.split("process 12 ")[1] for line in _lines(tmp_path, 12)] == ["INFO in step", "WARNING out of step"]
    assert log_file(tmp_path, 12).name == "process_00012.log"


def test_process_0_has_no_mark(monkeypatch):
    before = sys.stderr
    mark_stderr()
    assert sys.stderr is before


def test_a_prefix_begins_lines_and_not_their_parts():
    stream = io.StringIO()
    marked = Prefixed(stream, "> ")
    for part in ("a", "b\nc\n", "", "\n", "d"):
        print(part, end="", file=marked, flush=True)
    assert stream.getvalue() == "> ab\n> c\n> \n> d"


def test_a_log_that_cannot_be_opened_is_told_and_stops_nothing(tmp_path, capfd):
    (tmp_path / "logs").write_text("a file")
    with process_log() as log_in:
        log_in(tmp_path)
        say("still here")
    err = capfd.readouterr().err
    assert "note: no log of process 0" in err and "still here" in err


def _in_thread(act, name="mine"):
    thread = threading.Thread(target=act, name=name)
    thread.start()
    thread.join()


def _raises(place):
    """A function of a file in a folder, which raises."""
    scope = {}
    exec(compile("def act():\n    raise OSError('the disk')\n", f"/packages/{place}/file.py", "exec"), scope)
    return scope["act"]


def _logs_as_orbax():
    logger = absl_logging.get_absl_logger()
    record = logger.makeRecord("absl", logging.ERROR, "/packages/orbax/future.py", 1, "failed: %s", ("x",), None)
    logger.handle(record)


def _never_retrieved():
    loop = asyncio.new_event_loop()
    future = loop.create_future()
    future.set_exception(OSError("the disk"))
    del future
    gc.collect()
    loop.close()


BACKGROUND = {
    "a log of Orbax": (_logs_as_orbax, "ERROR failed: x"),
    "a thread of Orbax": (lambda: _in_thread(_raises("orbax")), "OSError: the disk"),
    "an error that C++ prints": (
        lambda: _in_thread(lambda: sys.excepthook(OSError, OSError("the disk"), None)),
        "OSError: the disk",
    ),
    "asyncio": (_never_retrieved, "exception was never retrieved"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKGROUND)
def test_what_threads_of_libraries_report_goes_into_the_log_alone(name, tmp_path, capfd):
    act, text = BACKGROUND[name]
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    with process_log() as log_in:
        log_in(tmp_path)
        act()
    assert text in "\n".join(_lines(tmp_path))
    assert hooks == (sys.excepthook, threading.excepthook, sys.unraisablehook)
    assert not capfd.readouterr().err


def test_a_thread_of_ours_that_fails_is_a_line_and_its_traceback_is_in_the_log(tmp_path, capfd):
    with process_log() as log_in:
        log_in(tmp_path)
        _in_thread(_raises("shortcut_jax"))
    assert capfd.readouterr().err == "error in thread mine: OSError: the disk\n"
    log = "\n".join(_lines(tmp_path))
    assert "ERROR thread mine: OSError: the disk" in log and "Traceback" in log


def test_a_log_on_a_full_disk_is_told_once_and_stops_nothing(tmp_path, capfd, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    with process_log() as log_in:
        log_in(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(logging.FileHandler, "flush", full)
            say("one")
            say("two")
        say("three")
    err = capfd.readouterr().err.splitlines()
    assert [line for line in err if line not in ("one", "two", "three")] == [
        f"note: {log_file(tmp_path, 0)} cannot be written: [Errno 28] No space left on device"
    ]
