"""The report as one HTML file that asks for nothing else: styles and pictures inside, all text escaped.

Bars and histograms are SVG that takes its colours from the page, so that dark and light screens both work. What stands
in data is made visible, so that it can neither steer a terminal nor break a line.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from html import escape

from rm_gallery.inspection.page import Bars, Block, Chart, Figures, Grid, Page, Section
from rm_gallery.inspection.report import Sample, Stretch
from rm_gallery.inspection.views import Piece

MARKER = "rm-gallery show-data"
"""Stands near the beginning of every report, so that one can be told from other files."""

_LEVELS = {"act": "mend before training", "know": "keep in mind", "good": "fine"}
_KINDS = {"both": "shared", "all": "shared", "chosen": "chosen", "rejected": "rejected"}


def html_of(page: Page) -> str:
    """The whole file as text."""
    body = [f"<h1>{_line(page.title)}</h1>", *(f'<p class="lead">{_line(line)}</p>' for line in page.lead)]
    body.append("<h2>What to look at first</h2><ul class='verdicts'>")
    for verdict in page.verdicts:
        word = _LEVELS[verdict.level]
        body.append(f'<li class="{verdict.level}"><b>{word}</b><span>{_line(verdict.text)}</span></li>')
    body.append("</ul>")
    body += [_section(section) for section in page.sections]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="{MARKER}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Even if some text were to get through the escaping, nothing would run and nothing would be fetched.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{_line(page.title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _section(section: Section) -> str:
    parts = [f'<section><h2>{_line(section.title)}</h2><p class="why">{_line(section.why)}</p>']
    charts: list[str] = []
    for block in section.blocks:
        if isinstance(block, Chart):
            charts.append(f"<figure><figcaption>{_line(block.title)}</figcaption>{chart_svg(block)}</figure>")
        else:
            parts.append(_block(block))
    if charts:
        parts.append(f'<div class="charts">{"".join(charts)}</div>')
    return "".join([*parts, "</section>"])


def _block(block: Block) -> str:
    if isinstance(block, str):
        return f'<p class="remark">{_line(block)}</p>'
    if isinstance(block, Figures):
        return _figures(block)
    if isinstance(block, Grid):
        return _grid(block)
    if isinstance(block, Bars):
        return bars_svg(block)
    assert not isinstance(block, Chart)
    note = (
        '<p class="remark">Shades change with every token; <span class="special">control tokens</span> are framed.</p>'
        if block.unit == "tokens"
        else ""
    )
    return note + "".join(_sample(sample, block.unit) for sample in block.samples)


def _figures(block: Figures) -> str:
    rows = []
    for row in block.rows:
        kind = ' class="out"' if row.stands_out else ""
        examples = f'<div class="examples">e.g. {_line(", ".join(row.examples))}</div>' if row.examples else ""
        rows.append(
            f"<tr{kind}><th>{_line(row.label)}</th><td class='number'>{_line(row.value)}</td>"
            f"<td class='why'>{_line(row.why)}{examples}</td></tr>"
        )
    return f'<table class="figures">{"".join(rows)}</table>'


def _grid(block: Grid) -> str:
    head = "".join(f"<th>{_line(name)}</th>" for name in block.header)
    rows = ["".join(f"<td>{_line(cell)}</td>" for cell in row) for row in block.rows]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table class="grid"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _sample(sample: Sample, unit: str) -> str:
    source = f" <small>{_line(sample.source)}</small>" if sample.source else ""
    parts = [f"<article><h3>{_line(sample.where)}{source}</h3>"]
    for stretch in (sample.prefix, *sample.responses):
        label = f"{stretch.label} begin with" if stretch is sample.prefix else stretch.label
        kind = _KINDS.get(stretch.label, "other")
        hidden = f' <i class="hidden">... {stretch.num_hidden:,} {unit} more ...</i> ' if stretch.num_hidden else ""
        parts.append(
            f'<div class="stretch {kind}"><h4>{_line(label)} <small>{stretch.length:,} {_line(unit)}</small></h4>'
            f'<pre dir="auto">{_pieces(stretch.head, unit)}{hidden}{_tail(stretch, unit)}</pre></div>'
        )
    if sample.num_hidden_responses:
        parts.append(f'<p class="remark">and {sample.num_hidden_responses} more responses</p>')
    return "".join([*parts, "</article>"])


def _tail(stretch: Stretch, unit: str) -> str:
    return _pieces(stretch.tail, unit) if stretch.num_hidden else ""


def _pieces(pieces: Sequence[Piece], unit: str) -> str:
    if unit != "tokens":
        return escape(visible("".join(piece.text for piece in pieces)))
    parts = []
    for place, piece in enumerate(pieces):
        kind = "special" if piece.special else "ab"[place % 2]
        ids = " ".join(map(str, piece.ids))
        shown = escape(visible(piece.text)).replace("\n", '<i class="newline">\\n</i>\n')
        parts.append(f'<span class="{kind}" title="id {ids}">{shown}</span>')
    return "".join(parts)


def _line(text: str) -> str:
    return escape(one_line(text))


_ROW = 30
_LABEL_WIDTH = 250
_BAR_WIDTH = 400
_TEXT_WIDTH = 210
_PLOT_WIDTH, _PLOT_HEIGHT = 400, 120
_LEFT, _TOP, _BOTTOM = 10, 18, 40


def bars_svg(block: Bars) -> str:
    """Horizontal bars with their values written behind them."""
    end = block.end if block.end is not None else max(bar.value for bar in block.bars) or 1.0

    def x(value: float) -> float:
        share = (value - block.start) / (end - block.start)
        return _LABEL_WIDTH + _BAR_WIDTH * max(0.0, min(1.0, share))

    height = _ROW * len(block.bars) + (22 if block.mark else 0)
    parts = []
    for place, bar in enumerate(block.bars):
        top = _ROW * place + 5
        middle = top + 14
        parts.append(_text(_LABEL_WIDTH - 10, middle, bar.label, "end"))
        parts.append(f'<rect class="track" x="{_LABEL_WIDTH}" y="{top}" width="{_BAR_WIDTH}" height="20" rx="3"/>')
        width = x(bar.value) - _LABEL_WIDTH
        parts.append(f'<rect class="bar" x="{_LABEL_WIDTH}" y="{top}" width="{width:.1f}" height="20" rx="3"/>')
        if bar.error:
            left, right = x(bar.value - bar.error), x(bar.value + bar.error)
            parts.append(
                f'<path class="error" d="M{left:.1f} {top + 10}H{right:.1f}M{left:.1f} {top + 5}V{top + 15}'
                f'M{right:.1f} {top + 5}V{top + 15}"/>'
            )
        parts.append(_text(_LABEL_WIDTH + _BAR_WIDTH + 10, middle, bar.text, "start", "number"))
    if block.mark is not None:
        place_x, bottom = x(block.mark[0]), _ROW * len(block.bars)
        parts.append(f'<path class="mark" d="M{place_x:.1f} 0V{bottom + 4}"/>')
        parts.append(_text(place_x, bottom + 17, f"{block.mark[1]}: {block.mark[0]:g}", "middle", "small"))
        parts.append(_text(_LABEL_WIDTH + _BAR_WIDTH, bottom + 17, f"{end:g}", "middle", "small"))
        parts.append(_text(_LABEL_WIDTH, bottom + 17, f"{block.start:g}", "middle", "small"))
    description = "; ".join(f"{bar.label}: {bar.text}" for bar in block.bars)
    return _svg(_LABEL_WIDTH + _BAR_WIDTH + _TEXT_WIDTH, height, description, parts, "wide")


def chart_svg(block: Chart) -> str:
    """A histogram; bins that lie beyond the mark are drawn in another colour."""
    edges, counts = block.histogram.edges, block.histogram.counts
    step = _PLOT_WIDTH / len(counts)
    parts = [_text(_LEFT, 12, f"most rows in one bar: {max(counts):,}", "start", "small")]
    floor = _TOP + _PLOT_HEIGHT
    for place, (low, count) in enumerate(zip(edges, counts, strict=True)):
        height = max(1.0 if count else 0.0, _PLOT_HEIGHT * count / max(counts))
        kind = "bar beyond" if block.mark is not None and low > block.mark else "bar"
        upper = f"to {edges[place + 1] - 1:,}" if place + 1 < len(edges) else "and more"
        parts.append(
            f'<rect class="{kind}" x="{_LEFT + place * step + 1:.1f}" y="{floor - height:.1f}" '
            f'width="{max(1.0, step - 2):.1f}" height="{height:.1f}"><title>{low:,} {upper} {escape(block.unit)}: '
            f"{count:,}</title></rect>"
        )
    parts.append(f'<path class="axis" d="M{_LEFT} {floor}H{_LEFT + _PLOT_WIDTH}"/>')
    every = max(1, -(-len(edges) // 6))
    for place in range(0, len(edges), every):
        plus = "+" if place == len(edges) - 1 else ""
        parts.append(_text(_LEFT + place * step + 1, floor + 15, f"{edges[place]:,}{plus}", "start", "small"))
    parts.append(
        _text(_LEFT + _PLOT_WIDTH, floor + 32, f"{block.unit}; the last bar holds all that is longer", "end", "small")
    )
    return _svg(_PLOT_WIDTH + 2 * _LEFT, floor + _BOTTOM, f"{block.title}: histogram", parts, "chart")


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(one_line(text))}</text>'


def _svg(width: float, height: float, description: str, parts: list[str], kind: str) -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(one_line(description), quote=True)}">{"".join(parts)}</svg>'
    )


STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --dim: #5d6b7a; --page: #f5f7f9; --card: #fff; --line: #dde3e9;
  --bar: #3d7ea6; --track: #e8edf2; --beyond: #c8553d; --act: #b3261e; --know: #8a6100; --good: #2e7d46;
  --shared: #e3eef6; --chosen: #e5f3e8; --rejected: #fae9e6; --other: #f3eedd; --shade: rgba(0,0,0,.07); }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ee; --dim: #9aa7b5; --page: #12171d; --card: #1b222b;
  --line: #313c48; --bar: #5ba3cf; --track: #28313c; --beyond: #e27a63; --act: #ff8a80; --know: #e5b84b;
  --good: #76c893; --shared: #1d2f3d; --chosen: #1c3325; --rejected: #3d2522; --other: #35301f;
  --shade: rgba(255,255,255,.11); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto,
  "DejaVu Sans", sans-serif; }
main { max-width: 940px; margin: 0 auto; padding: 28px 18px 60px; }
h1 { font-size: 28px; margin: 0 0 6px; } h2 { font-size: 19px; margin: 0 0 2px; } main > h2 { margin: 22px 0 8px; }
h3 { font: 600 13px ui-monospace, "DejaVu Sans Mono", monospace; margin: 18px 0 6px; overflow-wrap: anywhere; }
h4 { font-size: 13px; margin: 0 0 2px; } small { color: var(--dim); font-weight: normal; }
.lead, .why, .remark { color: var(--dim); margin: 2px 0; overflow-wrap: anywhere; }
.remark { font-size: 14px; margin-top: 6px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 20px;
  margin-top: 18px; }
section > .why { margin-bottom: 12px; }
.verdicts { list-style: none; margin: 0; padding: 0; }
.verdicts li { display: flex; gap: 14px; background: var(--card); border: 1px solid var(--line); border-left: 5px solid;
  border-radius: 6px; padding: 7px 12px; margin-bottom: 6px; }
.verdicts b { flex: 0 0 150px; } .verdicts span { color: var(--ink); overflow-wrap: anywhere; }
.act { border-left-color: var(--act) !important; } .act b { color: var(--act); }
.know { border-left-color: var(--know) !important; } .know b { color: var(--know); }
.good { border-left-color: var(--good) !important; } .good b { color: var(--good); }
table { border-collapse: collapse; width: 100%; } .scroll { overflow-x: auto; }
th, td { text-align: left; vertical-align: top; padding: 5px 10px 5px 0; border-top: 1px solid var(--line); }
.figures tr:first-child > * { border-top: 0; } .figures th { font-weight: normal; width: 38%; }
.figures .number { font-weight: 600; white-space: nowrap; width: 17%; } .out .number { color: var(--know); }
.figures td.why { font-size: 14px; } .examples { font: 12.5px ui-monospace, "DejaVu Sans Mono", monospace; }
.grid th { border-top: 0; color: var(--dim); font-weight: 600; } .grid { font-variant-numeric: tabular-nums; }
.grid th:not(:first-child), .grid td:not(:first-child) { text-align: right; white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 14px 26px;
  margin-top: 14px; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: 14px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--ink); font-size: 14px; } svg .small { fill: var(--dim); font-size: 12px; }
.bar { fill: var(--bar); } .beyond { fill: var(--beyond); } .track { fill: var(--track); }
.axis, .mark, .error { stroke: var(--ink); fill: none; } .mark { stroke-dasharray: 4 3; } .error { stroke-width: 1.5; }
.stretch { border-radius: 6px; padding: 6px 10px; margin-top: 5px; } .shared { background: var(--shared); }
.chosen { background: var(--chosen); } .rejected { background: var(--rejected); } .other { background: var(--other); }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.55 ui-monospace, "DejaVu Sans Mono",
  monospace; }
.b { background: var(--shade); border-radius: 2px; } .newline, .hidden { color: var(--dim); font-style: normal; }
.special { outline: 1px solid var(--dim); outline-offset: -1px; border-radius: 3px; color: var(--know);
  padding: 0 2px; }
@media (max-width: 620px) { .verdicts li { display: block; } .charts { grid-template-columns: 1fr; } }
"""


# C0 and C1 controls (escape sequences begin with them), half characters, and marks that change the reading direction.
_HARMFUL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def visible(text: str) -> str:
    """The text with harmful characters written as their codes; tabs and newlines stay."""
    return _HARMFUL.sub(lambda found: _code(found.group()), text)


def one_line(text: str) -> str:
    """The same on one line."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def _code(character: str) -> str:
    if unicodedata.category(character) == "Cc" and ord(character) < 256:
        return f"\\x{ord(character):02x}"
    return f"\\u{ord(character):04x}"
