"""The report in a terminal: colours where there are any, marks where there are none, at most 100 columns."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import TextIO

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from rm_gallery.inspection.html import one_line, visible
from rm_gallery.inspection.page import Bars, Block, Chart, Figures, Grid, Page, Samples
from rm_gallery.inspection.report import Sample, Stretch
from rm_gallery.inspection.views import Piece

MAX_WIDTH = 100
_LEVELS = {"act": ("!!", "bold red"), "know": ("! ", "yellow"), "good": ("ok", "green")}
_LEGEND = "!! mend before training   ! keep in mind   ok fine"
_COLORS = {"both": "cyan", "all": "cyan", "chosen": "green", "rejected": "red"}


def print_page(page: Page, stream: TextIO | None = None) -> None:
    """Print the report; characters that the stream cannot write become escapes."""
    stream = stream or sys.stdout
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    console.width = min(console.width, MAX_WIDTH)
    Printer(console).page(page)


class Printer:
    """Draws blocks on a console."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._in_color = console.color_system is not None
        self._full = "\u2588" if "utf" in (console.encoding or "").lower() else "#"

    def page(self, page: Page) -> None:
        self._print(Text(page.title, style="bold"))
        for line in page.lead:
            self._print(Text(one_line(line), style="dim"))
        self._console.print()
        self._print(Text("What to look at first", style="bold"))
        for verdict in page.verdicts:
            mark, style = _LEVELS[verdict.level]
            self._print(Text(one_line(verdict.text)), 3, Text(f"{mark} ", style=style))
        self._print(Text(_LEGEND, style="dim"))
        for section in page.sections:
            self._console.print()
            self._print(Text(section.title, style="bold underline" if self._in_color else ""))
            if not self._in_color:
                self._print(Text("-" * len(section.title)))
            self._print(Text(section.why, style="dim"))
            for block in section.blocks:
                self._block(block)

    def _print(self, text: Text, indent: int = 0, first: Text | None = None) -> None:
        """Wrapped and indented, without spaces at line ends; `first` stands in the indent of the first line."""
        for place, line in enumerate(text.wrap(self._console, self._console.width - indent, overflow="fold")):
            line.rstrip()
            lead = first if first is not None and place == 0 else Text(" " * indent if line else "")
            self._console.print(Text.assemble(lead, line))

    def _block(self, block: Block) -> None:
        if isinstance(block, str):
            self._print(Text(one_line(block), style="dim"), 2)
        elif isinstance(block, Figures):
            self._figures(block)
        elif isinstance(block, Grid):
            self._grid(block)
        elif isinstance(block, Bars):
            self._bars(block)
        elif isinstance(block, Samples):
            self._samples(block)
        elif block.is_main:
            self._chart(block)

    def _figures(self, block: Figures) -> None:
        for row in block.rows:
            style = "bold yellow" if row.stands_out else "bold"
            self._print(Text(f"{one_line(row.label)}: ").append(row.value, style=style), 2)
            if row.why:
                self._print(Text(one_line(row.why), style="dim"), 4)
            if row.examples:
                self._print(Text("e.g. " + ", ".join(map(one_line, row.examples)), style="dim"), 4)

    def _grid(self, block: Grid) -> None:
        rows = [[one_line(cell) for cell in row] for row in (block.header, *block.rows)]
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
        end = block.end if block.end is not None else max(bar.value for bar in block.bars) or 1.0

        def cells(value: float) -> int:
            return round(room * max(0.0, min(1.0, (value - block.start) / (end - block.start))))

        mark = None if block.mark is None else labels + 3 + cells(block.mark[0])
        for bar in block.bars:
            line = Text(f"  {bar.label:<{labels}} ")
            line.append(f"{self._full * cells(bar.value):<{room}}", style="cyan").append(f" {bar.text:>{texts}}")
            if mark is not None:
                line = Text.assemble(line[:mark], ("|", "bold"), line[mark + 1 :])
            self._console.print(line)
        if block.mark is not None and mark is not None:
            note = f"{block.mark[1]}: {block.mark[0]:g}; the scale runs from {block.start:g} to {end:g}"
            self._print(Text(note, style="dim"), mark + 2, Text(" " * mark + "| "))

    def _chart(self, block: Chart) -> None:
        edges, counts = block.histogram.edges, block.histogram.counts
        labels = [f"{low:,} to {high - 1:,}" for low, high in pairwise(edges)]
        labels.append(f"{edges[-1]:,} and more")
        width, texts = max(map(len, labels)), max(len(f"{count:,}") for count in counts)
        room = max(10, self._console.width - width - texts - 6)
        self._print(Text(f"{block.title}, {block.unit}", style="bold"), 2)
        for label, low, count in zip(labels, edges, counts, strict=True):
            filled = round(room * count / max(counts))
            bar = self._full * filled if filled or not count else "."
            is_beyond = block.mark is not None and low > block.mark
            line = Text(f"  {label:>{width}} ").append(f"{bar:<{room}}", style="red" if is_beyond else "cyan")
            self._console.print(line.append(f" {count:>{texts},}"))

    def _samples(self, block: Samples) -> None:
        if block.unit == "tokens":
            how = (
                "every other token is underlined" if self._in_color else "| between tokens, [[ ]] around control tokens"
            )
            self._print(Text(f"{how}; \\n is a line break", style="dim"), 2)
        for sample in block.samples:
            self._sample(sample, block.unit)

    def _sample(self, sample: Sample, unit: str) -> None:
        self._console.print()
        self._print(Text(one_line(sample.where), style="bold").append(f"  {one_line(sample.source)}", style="dim"), 2)
        for stretch in (sample.prefix, *sample.responses):
            label = f"{stretch.label} begin with" if stretch is sample.prefix else stretch.label
            color = _COLORS.get(stretch.label, "yellow")
            self._print(Text(label, style=f"bold {color}").append(f" ({stretch.length:,} {unit})", style="dim"), 2)
            self._print(self._stretch(stretch, color, unit), 4)
        if sample.num_hidden_responses:
            self._print(Text(f"and {sample.num_hidden_responses} more responses", style="dim"), 2)

    def _stretch(self, stretch: Stretch, color: str, unit: str) -> Text:
        text = self._pieces(stretch.head, color, unit)
        if stretch.num_hidden:
            text.append(f" ... {stretch.num_hidden:,} {unit} more ... ", style="dim")
            text.append_text(self._pieces(stretch.tail, color, unit))
        text.rstrip()
        return text

    def _pieces(self, pieces: Sequence[Piece], color: str, unit: str) -> Text:
        """Tokens in turns plain and underlined, or with a bar between them; words as they are."""
        text = Text()
        for place, piece in enumerate(pieces):
            shown = visible(piece.text).replace("\t", "\\t").replace("\n", "\\n\n")
            if not self._in_color and unit == "tokens":
                shown = f"[[{shown}]]" if piece.special else shown
                text.append(f"|{shown}" if place else shown)
                continue
            style = "bold magenta" if piece.special else color
            text.append(shown, style=f"{style} underline" if unit == "tokens" and place % 2 else style)
        return text
