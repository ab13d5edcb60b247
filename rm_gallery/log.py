"""Logging of entry points: one format with a rank prefix. Importing the package configures nothing."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from rm_gallery.safe_text import redact, safe, visible_line


def setup_logging(level: int = logging.INFO) -> None:
    """Log to standard error. Ranks above 0 log errors only, with the prefix `[rank N]`.

    The levels of other libraries stay unchanged. Calling it again applies the new level and the current `sys.stderr`.
    """
    rank = _number("RANK")
    logger = logging.getLogger("rm_gallery")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        prefix = f"[rank {rank}] " if rank else ""
        has_colors = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb" and "NO_COLOR" not in os.environ
        kind = _TerminalFormatter if has_colors else _Formatter
        handler.setFormatter(kind(f"{prefix}%(levelname).1s %(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    for known in logger.handlers:
        if type(known) is logging.StreamHandler:
            known.stream = sys.stderr  # setStream would flush the old stream, which may be closed
    logger.setLevel(level if rank == 0 else logging.ERROR)


class _Formatter(logging.Formatter):
    """Redacts secrets and escapes control characters. A message stays in one line, so that no text forges a second."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = visible_line(redact(record.message))
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return safe(super().formatException(ei))


class _TerminalFormatter(_Formatter):
    """Warnings in yellow, errors in red; lines wrapped between words, where a terminal would break a number."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        text, columns = super().formatMessage(record), shutil.get_terminal_size().columns
        if len(text) <= columns:
            return text
        return textwrap.fill(
            text, max(columns, 40), subsequent_indent=" " * 11, break_long_words=False, break_on_hyphens=False
        )

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        return f"\x1b[{31 if record.levelno >= logging.ERROR else 33}m{text}\x1b[0m"


@contextmanager
def log_copy() -> Iterator[Callable[[Path], None]]:
    """Copy the log to a file whose path becomes known later: call the yielded function with it.

    The file gets the messages since the block began, is appended to, and is closed at its end.
    """
    logger = logging.getLogger("rm_gallery")
    memory = MemoryHandler(1_000_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)

    def start(path: Path) -> None:
        file = logging.FileHandler(path, encoding="utf-8")
        file.setFormatter(_Formatter("%(levelname).1s %(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        memory.setTarget(file)
        memory.flush()
        memory.capacity = 1  # write each message from now on

    logger.addHandler(memory)
    try:
        yield start
    finally:
        logger.removeHandler(memory)
        file = memory.target
        memory.close()
        if file is not None:
            file.close()


def setup_excepthook() -> None:
    """Print the traceback of an uncaught exception as log lines are printed: redacted and escaped."""
    sys.excepthook = lambda _kind, error, _trace: print(safe_traceback(error), end="", file=sys.stderr)


def safe_traceback(error: BaseException) -> str:
    """The traceback of an error, redacted and escaped."""
    return safe("".join(traceback.format_exception(error)))


def wait_for_local_main(seconds: float = 2.0) -> str:
    """Call before printing the error that ends a process. Return the prefix of its rank: `[rank N] `, "" on rank 0.

    Local rank 0 returns immediately. The others wait: they usually fail for the same reason, and torchrun stops them
    before they repeat it.
    """
    if _number("LOCAL_RANK"):
        time.sleep(seconds)
    rank = _number("RANK")
    return f"[rank {rank}] " if rank else ""


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0
