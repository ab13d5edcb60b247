"""The live progress bar on a terminal (rich): what is printed or logged meanwhile appears above it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

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
