"""The page in a terminal: colors if the terminal has them, marks otherwise, at most 100 columns."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from rm_gallery.inspection.page import Bars, Block, Chart, Figures, Page, Samples, Table
from rm_gallery.inspection.report import Sample, Segment
from rm_gallery.inspection.texts import Piece
from rm_gallery.safe_text import visible, visible_line

MAX_WIDTH = 100
_LEVELS = {"error": "bold red", "warning": "yellow", "ok": "green"}
_COLORS = {"shared prefix": "cyan", "read": "cyan", "chosen": "green", "predicted": "green", "rejected": "red"}


def print_page(page: Page, stream: TextIO | None = None, *, summary_only: bool = False) -> None:
    """Print the report, or its summary only; characters that the stream cannot encode become escapes."""
    stream = stream or sys.stdout
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    console.width = min(console.width, MAX_WIDTH)
    _Printer(console).page(page, summary_only)


class _Printer:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._in_color = console.color_system is not None
        self._full = "\u2588" if "utf" in (console.encoding or "").lower() else "#"

    def page(self, page: Page, summary_only: bool) -> None:
        self._print(Text(page.title, style="bold"))
        for line in page.lead:
            self._print(Text(visible_line(line), style="dim"))
        self._title("Summary")
        for message in page.summary:
            level = Text(f"{message.level:<9}", style=_LEVELS[message.level])
            self._print(Text(visible_line(message.text)), 9, level)
        for section in () if summary_only else page.sections:
            self._title(section.title)
            self._print(Text(section.why, style="dim"))
            for block in section.blocks:
                self._block(block)

    def _title(self, title: str) -> None:
        self._console.print()
        self._print(Text(title, style="bold underline" if self._in_color else ""))
        if not self._in_color:
            self._print(Text("-" * len(title)))

    def _print(self, text: Text, indent: int = 0, first: Text | None = None) -> None:
        """Wrapped and indented, without spaces at line ends; `first` replaces the indent of the first line."""
        for place, line in enumerate(text.wrap(self._console, self._console.width - indent, overflow="fold")):
            line.rstrip()
            lead = first if first is not None and place == 0 else Text(" " * indent if line else "")
            self._console.print(Text.assemble(lead, line))

    def _block(self, block: Block) -> None:
        if isinstance(block, Figures):
            self._figures(block)
        elif isinstance(block, Table):
            self._table(block)
        elif isinstance(block, Bars):
            self._bars(block)
        elif isinstance(block, Samples):
            self._samples(block)
        elif isinstance(block, Chart):
            if block.is_main:
                self._chart(block)
        else:
            self._print(Text(visible_line(block.text), style="dim"), 2)

    def _figures(self, block: Figures) -> None:
        for row in block.rows:
            style = "bold yellow" if row.is_hit else "bold"
            self._print(Text(f"{visible_line(row.label)}: ").append(row.value, style=style), 2)
            if row.why:
                self._print(Text(visible_line(row.why), style="dim"), 4)
            if row.examples:
                self._print(Text("e.g. " + ", ".join(map(visible_line, row.examples)), style="dim"), 4)

    def _table(self, block: Table) -> None:
        rows = [[visible_line(cell) for cell in row] for row in (block.header, *block.rows)]
        widths = [max(cell_len(row[place]) for row in rows) for place in range(len(block.header))]
        widths[0] = min(widths[0], self._console.width - 2 - sum(widths[1:]) - 2 * len(widths[1:]))
        for number, row in enumerate(rows):
            cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            line = "  ".join([set_cell_size(row[0], widths[0]), *cells])
            self._console.print(Text(f"  {line}", style="" if number else "bold"))

    def _bars(self, block: Bars) -> None:
        labels = max(len(bar.label) for bar in block.bars)
        texts = max(len(bar.text) for bar in block.bars)
        room = max(10, self._console.width - labels - texts - 6)
        mark = None if block.mark is None else labels + 3 + round(room * block.position(block.mark[0]))
        for bar in block.bars:
            line = Text(f"  {bar.label:<{labels}} ")
            filled = self._full * round(room * block.position(bar.value))
            line.append(f"{filled:<{room}}", style="cyan").append(f" {bar.text:>{texts}}")
            if mark is not None:
                line = Text.assemble(line[:mark], ("|", "bold"), line[mark + 1 :])
            self._console.print(line)
        if block.mark is not None and mark is not None:
            note = f"{block.mark[1]}: {block.mark[0]:g}; scale: {block.start:g} to {block.end:g}"
            self._print(Text(note, style="dim"), mark + 2, Text(" " * mark + "| "))

    def _chart(self, block: Chart) -> None:
        bins = list(block.bins())
        width, texts = max(len(label) for label, _, _ in bins), max(len(f"{count:,}") for _, count, _ in bins)
        room = max(10, self._console.width - width - texts - 6)
        self._print(Text(f"{block.title}, {block.unit}", style="bold"), 2)
        for label, count, is_beyond in bins:
            filled = round(room * count / max(block.histogram.counts))
            bar = self._full * filled if filled or not count else "."
            line = Text(f"  {label:>{width}} ").append(f"{bar:<{room}}", style="red" if is_beyond else "cyan")
            self._console.print(line.append(f" {count:>{texts},}"))

    def _samples(self, block: Samples) -> None:
        if block.unit == "tokens":
            marks = "tokens alternate plain and underlined" if self._in_color else "| separates tokens"
            self._print(Text(f"{marks}; [[ ]] marks special tokens; \\n is a line break", style="dim"), 2)
        for sample in block.samples:
            self._sample(sample, block.unit)

    def _sample(self, sample: Sample, unit: str) -> None:
        self._console.print()
        self._print(
            Text(visible_line(sample.where), style="bold").append(f"  {visible_line(sample.source)}", style="dim"), 2
        )
        for segment in (sample.prefix, *sample.responses):
            color = _COLORS.get(segment.label, "yellow")
            label = Text(segment.label, style=f"bold {color}")
            self._print(label.append(f" ({segment.length:,} {unit})", style="dim"), 2)
            self._print(self._segment(segment, color, unit), 4)
        if sample.num_hidden_responses:
            self._print(Text(f"{sample.num_hidden_responses} more responses", style="dim"), 2)

    def _segment(self, segment: Segment, color: str, unit: str) -> Text:
        text = self._pieces(segment.head, color, unit)
        if segment.num_hidden:
            text.append(f" ... {segment.num_hidden:,} {unit} hidden ... ", style="dim")
            text.append_text(self._pieces(segment.tail, color, unit))
        text.rstrip()
        return text

    def _pieces(self, pieces: Sequence[Piece], color: str, unit: str) -> Text:
        text = Text()
        for place, piece in enumerate(pieces):
            shown = visible(piece.text).replace("\t", "\\t").replace("\n", "\\n\n")
            if unit != "tokens":
                text.append(shown, style=color)
                continue
            shown = f"[[{shown}]]" if piece.special else shown
            style = "bold magenta" if piece.special else color
            separator = "" if self._in_color or not place else "|"
            text.append(separator + shown, style=f"{style} underline" if self._in_color and place % 2 else style)
        return text
