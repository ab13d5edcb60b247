"""Pictures: bars and histograms as SVG that takes its colours from the page, so that dark and light both work."""

from __future__ import annotations

from html import escape

from rm_gallery.inspection.blocks import Bars, Chart
from rm_gallery.inspection.safe_text import one_line

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
    parts = [_text(_LEFT, 12, f"tallest bar: {max(counts):,}", "start", "small")]
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
