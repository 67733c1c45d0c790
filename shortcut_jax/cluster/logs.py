"""The log of each process: `logs/process_00003.log` in the workdir, and its index before what it writes to stderr."""

import contextlib
import io
import logging
import logging.handlers
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import jax

from shortcut_jax.cluster import key_value
from shortcut_jax.cluster.background import background_to

LOGGER = logging.getLogger("shortcut_jax")
"""What is logged here goes into the process's own file; `distributed.say` prints and logs."""

FORMAT = "%(asctime)s process {index} %(levelname)s %(message)s"


def log_file(workdir: Path, index: int) -> Path:
    """The log of process `index`."""
    return workdir / "logs" / f"process_{index:05d}.log"


class Prefixed(io.TextIOBase):
    """A text stream that writes a prefix at the beginning of each line."""

    def __init__(self, stream: TextIO, prefix: str):
        self._stream, self._prefix, self._begins = stream, prefix, True

    def write(self, text: str) -> int:
        """Writes text, which may hold several lines or a part of one."""
        for line in text.splitlines(keepends=True):
            self._stream.write(self._prefix + line if self._begins else line)
            self._begins = line.endswith(("\n", "\r"))
        return len(text)

    def flush(self) -> None:
        """Flushes the stream below."""
        self._stream.flush()

    def isatty(self) -> bool:
        """Whether the stream below is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """The file descriptor below, which knows nothing of the prefix."""
        return self._stream.fileno()


def mark_stderr() -> None:
    """Puts `[process 3] ` before each line that Python writes to stderr, but on process 0, from here on."""
    index = key_value.process_id()  # known before there are devices
    if index > 0 and not isinstance(sys.stderr, Prefixed):
        sys.stderr = Prefixed(sys.stderr, f"[process {index}] ")


class _LogFile(logging.FileHandler):
    """Where the disk is full, the log cannot be written either: that is reported in a line, once."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the name in logging)
        if not self.told:
            self.told = True
            print(f"note: {self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr, flush=True)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what is left in its buffer
            super().close()


@contextlib.contextmanager
def process_log() -> Iterator[Callable[[Path], None]]:
    """Logs this process in a workdir, whose name comes later, by calling what this yields.

    Nothing is written before that, and what was logged until then comes first. Everything of ours is logged, and
    warnings of libraries, and with its traceback whatever leaves the block. Where the file cannot be opened or written,
    that is said and the run continues.
    """
    index, root = jax.process_index(), logging.getLogger()
    buffer = logging.handlers.MemoryHandler(capacity=1)  # keeps everything as long as it has no target
    printer = _warnings_to_stderr()
    handlers = [(LOGGER, buffer), (LOGGER, printer), (root, buffer)]
    if not root.handlers:  # with the buffer in it, it no longer prints warnings by itself
        handlers.append((root, printer))
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # some library may have made the root print everything
    for logger, handler in handlers:
        logger.addHandler(handler)

    def open_in(workdir: Path) -> None:
        path = log_file(workdir, index)
        try:
            path.parent.mkdir(exist_ok=True)
            target = _LogFile(path)
        except OSError as error:
            print(f"note: no log of process {index}: {error}", file=sys.stderr, flush=True)
            return
        target.setFormatter(logging.Formatter(FORMAT.format(index=index)))
        buffer.setTarget(target)
        buffer.flush()

    try:
        with background_to(buffer.handle):
            yield open_in
    except BaseException as error:
        LOGGER.error("%s: %s", type(error).__name__, error, exc_info=True, extra={"printed": True})
        raise
    finally:
        for logger, handler in handlers:
            logger.removeHandler(handler)
        LOGGER.setLevel(logging.NOTSET)
        LOGGER.propagate = True
        target = buffer.target
        buffer.close()
        if target:
            target.close()


def _warnings_to_stderr() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    handler.addFilter(lambda record: not getattr(record, "printed", False))
    return handler
