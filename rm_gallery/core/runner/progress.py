"""The live progress bar of a grading run: on standard error, and only on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


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

    from rm_gallery.training.trackers.bar import move_handlers

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
