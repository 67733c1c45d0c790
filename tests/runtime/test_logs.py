import io
import logging
import re
import sys

import jax
import pytest

from shortcut_jax.runtime import key_value
from shortcut_jax.runtime.distributed import say
from shortcut_jax.runtime.logs import LOGGER, Prefixed, log_file, mark_stderr, process_log


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
