"""The progress bar of training, scoring and grading (rich). Drawn on terminals only."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from rm_gallery.safe_text import visible, visible_line

log = logging.getLogger(__name__)

_LOG_INTERVAL_S = 30.0
_LOGGERS = ("", "rm_gallery", "transformers")  # those that may have a handler on the terminal


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a bar can be drawn on the stream. rich obeys FORCE_COLOR, which would write control codes to files."""
    return stream is not None and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class ProgressBar:
    """Draws `DESCRIPTION 123/300 ====---- TEXT` until it is closed; a context manager.

    Lines printed or logged while it is shown appear above the bar, which is removed at the end. On a narrow terminal
    the bar shrinks first, then the text is cropped.
    """

    def __init__(
        self, description: str, total: int | None, start: int = 0, *,
        stream: TextIO | None = None, show: bool = True, times: bool = True, log_unit: str | None = None,
    ) -> None:  # fmt: skip
        """total: None if unknown. start: items completed earlier; they do not count for the rate.

        stream: by default standard error. times: draw elapsed and remaining time. log_unit: name of an item ("rows");
        where nothing is drawn, progress is then logged every 30 seconds.
        """
        self._description, self._total, self._done, self._start = description, total, start, start
        self._errors = 0
        self._log_unit = log_unit
        self._started_at = self._logged_at = time.monotonic()
        self._moved: list[tuple[logging.StreamHandler[TextIO], TextIO]] = []
        stream = sys.stderr if stream is None else stream
        self._progress: Any = None
        if show and is_terminal(stream):
            self._draw(stream, times)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, count: int = 1, *, errors: int = 0) -> None:
        """Count completed items, and those of them that are errors."""
        self._errors += errors
        self.update(self._done + count, f"{self._errors} errors" if self._errors else "")

    def update(self, done: int, text: str) -> None:
        """Set the number of completed items and the text after the bar."""
        self._done = done
        if self._progress is not None:
            self._progress.update(
                self._progress.task_ids[0], completed=done, count=self._count(), text=visible_line(text)
            )
        elif self._log_unit and time.monotonic() - self._logged_at > _LOG_INTERVAL_S:
            self._logged_at = time.monotonic()
            log.info("%s %s, %.1f %s/s", self._count(), self._log_unit, self.rate, self._log_unit)

    @property
    def rate(self) -> float:
        """Items per second since the start."""
        return (self._done - self._start) / max(time.monotonic() - self._started_at, 1e-9)

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(visible(text), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Remove the bar, and restore the streams and the log handlers."""
        for handler, stream in self._moved:
            handler.setStream(stream)
        self._moved = []
        if self._progress is not None:
            self._progress.stop()

    def _count(self) -> str:
        return f"{visible_line(self._description)} {self._done}/{'?' if self._total is None else self._total}"

    def _draw(self, stream: TextIO, times: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            ProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.table import Column

        columns: list[ProgressColumn] = [
            TextColumn("{task.fields[count]}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
        ]
        if times:
            columns += [TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("left")]
        self._progress = Progress(
            *columns,
            TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, overflow="crop")),
            console=Console(file=stream, force_terminal=True),
            redirect_stdout=sys.stdout.isatty(),  # a redirected stdout is left alone
            refresh_per_second=4,
            transient=True,
            expand=True,
        )
        self._progress.add_task("", total=self._total, completed=self._start, count=self._count(), text="")
        before = (sys.stdout, sys.stderr)
        self._progress.start()
        self._moved = _move_handlers(before, (sys.stdout, sys.stderr))


def _move_handlers(
    before: Sequence[TextIO], after: Sequence[TextIO]
) -> list[tuple[logging.StreamHandler[TextIO], TextIO]]:
    """Redirect log handlers from a stream in `before` to its replacement in `after`; return each with its old stream.

    rich replaces sys.stderr, but a handler made earlier holds the terminal itself and would write into the bar.
    """
    moved = []
    for handler in [handler for name in _LOGGERS for handler in logging.getLogger(name).handlers]:
        for old, new in zip(before, after, strict=True):
            if isinstance(handler, logging.StreamHandler) and handler.stream is old and new is not old:
                handler.setStream(new)
                moved.append((handler, old))
    return moved
