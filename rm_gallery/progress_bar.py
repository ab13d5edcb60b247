"""Progress bars (rich): of training, of a long pass over files, of a grading run; on a terminal only.

What is printed or logged meanwhile appears above the bar.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TextIO

log = logging.getLogger(__name__)

FIELDS = {
    "train/loss": "loss {:.4f}",
    "train/accuracy": "accuracy {:.3f}",
    "perf/pairs_per_second": "{:.1f} pairs/s",
}
LOGGERS = ("", "rm_gallery", "transformers")  # those that may hold a handler on the terminal


class Bar:
    """Shows `step 123/300 ====---- loss 0.5123  accuracy 0.790  45.1 pairs/s  0:01:20 left  val 0.800`.

    On a narrow terminal the bar gives way first, then the end of the text. The bar goes when it stops.
    """

    def __init__(self, stream: TextIO, total: int, start: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self._console = Console(file=stream, force_terminal=True)
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, overflow="crop")),
            console=self._console,
            redirect_stdout=sys.stdout.isatty(),  # a stdout that goes to a file keeps going there
            refresh_per_second=4,
            transient=True,
            expand=True,
        )
        self._task = self._progress.add_task("", total=total, completed=start, text="starting")
        before = (sys.stdout, sys.stderr)
        self._progress.start()
        self._moved = move_handlers(before, (sys.stdout, sys.stderr))

    def show(self, step: int, latest: Mapping[str, float], eta: str) -> None:
        """Draw the state after `step`, from the latest value of each metric; '' for a time left not known yet."""
        parts = [form.format(latest[name]) for name, form in FIELDS.items() if name in latest]
        parts += [f"{eta} left"] if eta else []
        parts += [f"val {latest['val/accuracy']:.3f}"] if "val/accuracy" in latest else []
        self._progress.update(self._task, completed=step, text="  ".join(parts))

    def print(self, text: str) -> None:
        """Leave a line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def print_table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Draw a table, if it has rows."""
        from rich.table import Table

        if not rows:
            return
        table = Table()
        for name in header:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*row)
        self._console.print(table)

    def stop(self) -> None:
        """Take the bar away, and give the streams and the log handlers back."""
        for handler, stream in self._moved:
            handler.setStream(stream)
        self._progress.stop()


def move_handlers(
    before: Sequence[TextIO], after: Sequence[TextIO]
) -> list[tuple[logging.StreamHandler[TextIO], TextIO]]:
    """Point log handlers on a stream in `before` at the one that has taken its place; return each with its old stream.

    rich swaps sys.stderr, but a handler made earlier holds the terminal itself and would write into the bar.
    """
    moved = []
    for handler in [handler for name in LOGGERS for handler in logging.getLogger(name).handlers]:
        for old, new in zip(before, after, strict=True):
            if isinstance(handler, logging.StreamHandler) and handler.stream is old and new is not old:
                handler.setStream(new)
                moved.append((handler, old))
    return moved


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


@contextlib.contextmanager
def progress_bar(total: int | None, *, show: bool) -> Iterator[Callable[[bool], None]]:
    """Gives a function to call once per result, with whether that is an error.

    total: results to come, those of an earlier run included; None when the dataset does not tell. The bar goes at the
    end. Where standard error is no terminal, or `show` is False, nothing is written.
    """
    if not show or sys.stderr is None or not sys.stderr.isatty():
        yield lambda is_error: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    progress = Progress(
        TextColumn("grading"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[errors]}", markup=False),
        console=Console(file=sys.stderr, force_terminal=True),
        redirect_stdout=sys.stdout.isatty(),  # a stdout that goes to a file keeps going there
        refresh_per_second=4,
        transient=True,
    )
    task = progress.add_task("", total=total, errors="")
    num_errors = 0

    def count(is_error: bool) -> None:
        nonlocal num_errors
        num_errors += is_error
        progress.update(task, advance=1, errors=f"{num_errors} errors" if num_errors else "")

    before = (sys.stdout, sys.stderr)
    with progress:
        moved = move_handlers(before, (sys.stdout, sys.stderr))
        try:
            yield count
        finally:
            for handler, stream in moved:
                handler.setStream(stream)
