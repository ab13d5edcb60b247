"""A chart of an HTML report as inline SVG: axes with ticks, title and description; the drawing is the caller's.

The text of a chart has 12 units of the 360 that its picture is wide, about the size of the page's text. A page
includes `html_chart.css.jinja`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rm_gallery.safe_text import visible_line

if TYPE_CHECKING:
    from markupsafe import Markup

_WIDTH, _HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 352, 26, 186


@dataclass
class Chart:
    """Axes with ticks, and what is drawn between them."""

    key: str
    """Unique in the page."""
    title: str
    about: str
    """The chart in words, for who cannot see it."""
    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str
    y_label: str
    tick: Callable[[float], str] = lambda value: f"{value:,.6g}"
    body: list[str] = field(default_factory=list)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Place in the picture; what is beyond the axes is drawn at their end."""
        across = min(1.0, max(0.0, (x - self.x[0]) / (self.x[1] - self.x[0])))
        up = min(1.0, max(0.0, (y - self.y[0]) / (self.y[1] - self.y[0])))
        return round(_LEFT + across * (_RIGHT - _LEFT), 1), round(_BOTTOM - up * (_BOTTOM - _TOP), 1)

    def line(self, kind: str, x: tuple[float, float], y: tuple[float, float]) -> None:
        (x1, y1), (x2, y2) = self.at(x[0], y[0]), self.at(x[1], y[1])
        self.body.append(f'<line class="{kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>')

    def markup(self, legend: Sequence[tuple[str, str]] = ()) -> Markup:
        """legend: class and label of each series."""
        from markupsafe import Markup, escape

        labels = f'aria-labelledby="{self.key}-t {self.key}-d"'
        lines = [
            f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" {labels}>',
            f'<title id="{self.key}-t">{escape(visible_line(self.title))}</title>',
            f'<desc id="{self.key}-d">{escape(visible_line(self.about))}</desc>',
        ]
        for value in ticks(*self.y):
            _, y = self.at(self.x[0], value)
            lines.append(f'<line class="rule" x1="{_LEFT}" y1="{y}" x2="{_RIGHT}" y2="{y}"/>')
            lines.append(f'<text class="end" x="{_LEFT - 6}" y="{y + 4}">{self.tick(value)}</text>')
        for value in ticks(*self.x):
            x, _ = self.at(value, self.y[0])
            lines.append(f'<line class="rule" x1="{x}" y1="{_BOTTOM}" x2="{x}" y2="{_BOTTOM + 4}"/>')
            lines.append(f'<text class="middle" x="{x}" y="{_BOTTOM + 17}">{self.tick(value)}</text>')
        lines += self.body
        lines.append(f'<line class="axis" x1="{_LEFT}" y1="{_BOTTOM}" x2="{_RIGHT}" y2="{_BOTTOM}"/>')
        lines.append(f'<text x="2" y="12">{escape(self.y_label)}</text>')
        lines.append(f'<text class="end" x="{_RIGHT}" y="{_BOTTOM + 36}">{escape(self.x_label)}</text>')
        place = float(_RIGHT)
        for kind, label in reversed(legend):
            place -= 7 * len(label)
            lines.append(f'<text x="{place}" y="12">{escape(label)}</text>')
            lines.append(f'<rect class="{kind}" x="{place - 15}" y="3" width="10" height="9"/>')
            place -= 30
        return Markup("\n".join([*lines, "</svg>"]))


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers from low to high."""
    rough = (high - low) / 5
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(scale * part for part in (1, 2, 5, 10) if scale * part >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]
