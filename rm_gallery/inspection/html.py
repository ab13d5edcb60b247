"""The report as one HTML file that asks for nothing else: styles and pictures inside, all text escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rm_gallery.inspection.blocks import Bars, Block, Chart, Figures, Grid, Page, Section
from rm_gallery.inspection.encoders import Piece
from rm_gallery.inspection.safe_text import one_line, visible
from rm_gallery.inspection.samples import Sample, Stretch
from rm_gallery.inspection.style import STYLE
from rm_gallery.inspection.svg import bars_svg, chart_svg

MARKER = "rm-gallery show-data"
"""Stands near the beginning of every report, so that one can be told from other files."""

_LEVELS = {"act": "mend first", "know": "keep in mind", "good": "fine"}
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
