"""Progress of a long pass over files: a bar on a terminal, a line in the log now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

log = logging.getLogger(__name__)

_LOG_SECONDS = 30.0


class Progress:
    """Counts rows; to be used as a context, so that the terminal is given back."""

    def __init__(self, text: str, total: int, start: int = 0) -> None:
        """start: rows that are there already; they do not count for the speed."""
        self._text, self._total, self._done, self._start = text, total, start, start
        self._began = self._logged = time.monotonic()
        self._bar = _make_bar(text, total, start) if sys.stderr.isatty() else None

    def add(self, count: int) -> None:
        """So many rows more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)
        elif time.monotonic() - self._logged > _LOG_SECONDS:
            self._logged = time.monotonic()
            log.info("%s: %d of %d rows, %.1f rows/s", self._text, self._done, self._total, self.rate)

    @property
    def rate(self) -> float:
        """Rows a second so far."""
        return (self._done - self._start) / max(time.monotonic() - self._began, 1e-9)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            from rm_gallery.training.trackers.bar import move_handlers

            before = (sys.stdout, sys.stderr)
            self._bar.start()
            self._moved = move_handlers(before, (sys.stdout, sys.stderr))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            for handler, stream in self._moved:
                handler.setStream(stream)
            self._bar.stop()


def _make_bar(text: str, total: int, start: int):  # type: ignore[no-untyped-def] # rich is loaded on a terminal only
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        redirect_stdout=sys.stdout.isatty(),
        refresh_per_second=4,
        transient=True,
    )
    bar.add_task(text, total=total, completed=start)
    return bar
