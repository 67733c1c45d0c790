"""What the threads of libraries report when storage fails: into the log, with tracebacks, in place of the terminal.

Orbax, TensorStore and asyncio write while training continues. A save that fails is reported in one line by whoever
waits for it; each of their threads would print the same error once more, with its traceback.
"""

import contextlib
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from absl import logging as absl_logging

_PLACES = ("/orbax/", "/tensorstore/", "/asyncio/")
"""Parts of the paths of source files."""

_LIBRARY = "a thread of a library"


@contextlib.contextmanager
def background_to(handle: Callable[[logging.LogRecord], Any]) -> Iterator[None]:
    """Inside the block `handle` gets what those threads log or raise; what other threads raise is a line besides."""

    def divert(record: logging.LogRecord) -> bool:
        if not (record.name == "asyncio" or any(place in record.pathname for place in _PLACES)):
            return True
        handle(record)
        return False

    def report(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None, who: str) -> None:
        if error is None:
            error = kind()
        shown = (kind, error, trace)
        text = f"{who}: {kind.__name__}: {error}"
        handle(logging.makeLogRecord({"levelno": logging.ERROR, "levelname": "ERROR", "msg": text, "exc_info": shown}))
        frames = traceback.extract_tb(trace)
        if who != _LIBRARY and not any(place in frame.filename for frame in frames for place in _PLACES):
            print(f"error in {' '.join(text.split())[:500]}", file=sys.stderr, flush=True)

    def of_thread(args: threading.ExceptHookArgs) -> None:
        if not issubclass(args.exc_type, SystemExit):
            who = args.thread.name if args.thread else "unknown"
            report(args.exc_type, args.exc_value, args.exc_traceback, f"thread {who}")

    def of_process(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            hooks[0](kind, error, trace)
        else:  # C++ calls this from threads of its own, such as TensorStore's where an event loop is closed
            report(kind, error, trace, _LIBRARY)

    def unraisable(args: "sys.UnraisableHookArgs") -> None:
        report(args.exc_type, args.exc_value, args.exc_traceback, str(args.err_msg or "ignored"))

    loggers = [absl_logging.get_absl_logger(), logging.getLogger("asyncio"), logging.getLogger()]
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    for logger in loggers:
        logger.addFilter(divert)
    sys.excepthook, threading.excepthook, sys.unraisablehook = of_process, of_thread, unraisable
    try:
        yield
    finally:
        sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
        for logger in loggers:
            logger.removeFilter(divert)
