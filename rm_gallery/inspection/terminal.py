"""The report in a terminal: colours where there are any, marks where there are none, at most 100 columns."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import TextIO

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rm_gallery.inspection.blocks import Bars, Block, Chart, Figures, Grid, Page, Samples
from rm_gallery.inspection.encoders import Piece
from rm_gallery.inspection.safe_text import one_line, visible
from rm_gallery.inspection.samples import Sample, Stretch

MAX_WIDTH = 100
_LEVELS = {"act": ("!!", "bold red"), "know": ("! ", "yellow"), "good": ("ok", "green")}
_LEVEL_WORDS = {"act": "mend before training", "know": "keep in mind", "good": "fine"}
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
            self._print(Text(visible(line), style="dim"))
        self._print(Text("\nWhat to look at first", style="bold"))
        for verdict in page.verdicts:
            mark, style = _LEVELS[verdict.level]
            row = Table.grid(padding=(0, 1))
            row.add_row(Text(mark, style=style), Text(one_line(verdict.text)))
            self._console.print(row)
        self._print(Text("   ".join(f"{_LEVELS[key][0].strip()} {word}" for key, word in _LEVEL_WORDS.items()), "dim"))
        for section in page.sections:
            self._print(Text())
            self._print(Text(section.title, style="bold underline" if self._in_color else ""))
            if not self._in_color:
                self._print(Text("-" * len(section.title)))
            self._print(Text(section.why, style="dim"))
            for block in section.blocks:
                self._block(block)

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=False)

    def _block(self, block: Block) -> None:
        if isinstance(block, str):
            self._console.print(Padding(Text(one_line(block), style="dim"), (0, 0, 0, 2)))
        elif isinstance(block, Figures):
            self._figures(block)
        elif isinstance(block, Grid):
            self._grid(block)
        elif isinstance(block, Bars):
            self._bars(block)
        elif isinstance(block, Chart):
            self._chart(block)
        else:
            self._samples(block)

    def _figures(self, block: Figures) -> None:
        for row in block.rows:
            style = "yellow" if row.stands_out else ""
            line = Text("  ").append(f"{one_line(row.label)}: ").append(row.value, style=f"bold {style}".strip())
            self._console.print(line)
            if row.why:
                self._console.print(Padding(Text(one_line(row.why), style="dim"), (0, 0, 0, 4)))
            if row.examples:
                examples = Text("e.g. " + ", ".join(map(one_line, row.examples)), style="dim", overflow="fold")
                self._console.print(Padding(examples, (0, 0, 0, 4)))

    def _grid(self, block: Grid) -> None:
        table = Table(box=None, pad_edge=False, padding=(0, 1), show_edge=False, header_style="bold")
        for place, name in enumerate(block.header):
            table.add_column(name, justify="left" if place == 0 else "right", overflow="fold")
        for row in block.rows:
            table.add_row(*(Text(one_line(cell)) for cell in row))
        self._console.print(Padding(table, (0, 0, 0, 2)))

    def _bars(self, block: Bars) -> None:
        width = max(len(bar.label) for bar in block.bars)
        text = max(len(bar.text) for bar in block.bars)
        room = max(10, self._console.width - width - text - 6)
        end = block.end if block.end is not None else max(bar.value for bar in block.bars) or 1
        for bar in block.bars:
            filled = self._full * round(room * max(0.0, min(1.0, (bar.value - block.start) / (end - block.start))))
            line = (
                Text(f"  {bar.label:<{width}} ")
                .append(f"{filled:<{room}}", style="cyan")
                .append(f" {bar.text:>{text}}")
            )
            if block.mark is not None:
                place = round(room * (block.mark[0] - block.start) / (end - block.start)) + 3 + width
                line = Text.assemble(line[:place], ("|", "bold"), line[place + 1 :])
            self._console.print(line)
        if block.mark is not None:
            place = round(room * (block.mark[0] - block.start) / (end - block.start)) + 3 + width
            note = f"{block.mark[1]}: {block.mark[0]:g}; the scale runs from {block.start:g} to {end:g}"
            self._print(Text(" " * place + "| ").append(note, style="dim"))

    def _chart(self, block: Chart) -> None:
        edges, counts = block.histogram.edges, block.histogram.counts
        labels = [f"{low:,} to {high - 1:,}" for low, high in pairwise(edges)]
        labels.append(f"{edges[-1]:,} and more")
        width, text = max(map(len, labels)), max(len(f"{count:,}") for count in counts)
        room = max(10, self._console.width - width - text - 6)
        self._print(Text(f"  {block.title}, {block.unit}", style="bold"))
        for label, low, count in zip(labels, edges, counts, strict=True):
            filled = round(room * count / max(counts))
            bar = self._full * filled if filled or not count else "."
            beyond = block.mark is not None and low > block.mark
            line = Text(f"  {label:>{width}} ").append(f"{bar:<{room}}", style="red" if beyond else "cyan")
            self._console.print(line.append(f" {count:>{text},}"))

    def _samples(self, block: Samples) -> None:
        for sample in block.samples:
            self._sample(sample, block.unit)
        if block.unit == "tokens" and not self._in_color:
            self._print(Text("  A | stands between tokens, [[ ]] around control tokens.", style="dim"))

    def _sample(self, sample: Sample, unit: str) -> None:
        self._print(
            Text(f"  {one_line(sample.where)}", style="bold").append(f"  {one_line(sample.source)}", style="dim")
        )
        for stretch in (sample.prefix, *sample.responses):
            name = "begin with" if stretch is sample.prefix else ""
            head = Text(f"  {stretch.label} {name}".rstrip(), style=f"bold {_color(stretch)}")
            self._print(head.append(f" ({stretch.length:,} {unit})", style="dim"))
            body = self._pieces(stretch.head, _color(stretch), unit)
            if stretch.num_hidden:
                body.append(f" ... {stretch.num_hidden:,} {unit} more ... ", style="dim")
                body.append_text(self._pieces(stretch.tail, _color(stretch), unit))
            self._console.print(Padding(body, (0, 0, 0, 4)))
        if sample.num_hidden_responses:
            self._print(Text(f"  and {sample.num_hidden_responses} more responses", style="dim"))

    def _pieces(self, pieces: Sequence[Piece], color: str, unit: str) -> Text:
        """Tokens in turns plain and underlined, or with a bar between them; words as they are."""
        text = Text(overflow="fold")
        for place, piece in enumerate(pieces):
            shown = visible(piece.text).replace("\n", "\\n\n").replace("\t", "\\t")
            if not self._in_color and unit == "tokens":
                shown = f"[[{shown}]]" if piece.special else shown
                text.append(shown if place == 0 else f"|{shown}")
                continue
            style = "bold magenta" if piece.special else color
            text.append(shown, style=f"{style} underline" if unit == "tokens" and place % 2 else style)
        return text


def _color(stretch: Stretch) -> str:
    return _COLORS.get(stretch.label, "yellow")
