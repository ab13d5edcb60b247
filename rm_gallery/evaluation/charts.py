"""Charts of the report as inline SVG: static, with title and description, and readable without colors.

Colors are those of the page (the classes are styled in report.html.jinja). A picture in a cell of a table has no text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from rm_gallery.evaluation.metrics import wilson
from rm_gallery.html_chart import Chart

if TYPE_CHECKING:
    from markupsafe import Markup

FEW_PAIRS = 20
"""A bin of the reliability diagram with fewer says little."""
_CLIPPED = 1.0
"""Percent of the points of a scatter plot at each side that may lie beyond its axes, and are drawn at the edge."""


def rewards(key: str, found: Mapping[str, Any]) -> Markup:
    """Histograms of the rewards of the better and of the worse responses, in the same bins."""
    edges, counts = found["edges"], found["counts"]
    most = max(max(each) for each in counts.values())
    middle = {name: _median(edges, each) for name, each in counts.items()}
    about = ", ".join(f"median of the {name} responses about {value:.3g}" for name, value in middle.items())
    chart = Chart(
        key, "Rewards of the better and the worse responses", about, (edges[0], edges[-1]), (0, most),
        "reward", "responses",
    )  # fmt: skip
    for name in ("worse", "better"):
        points = [chart.at(edges[0], 0)]
        for (low, high), count in zip(pairwise(edges), counts[name], strict=True):
            points += [chart.at(low, count), chart.at(high, count)]
        points.append(chart.at(edges[-1], 0))
        path = " ".join(f"{x},{y}" for x, y in points)
        chart.body.append(f'<polygon class="{name}" points="{path}"/>')
    return chart.markup([("better", "better"), ("worse", "worse")])


def margins(key: str, found: Mapping[str, Any]) -> Markup:
    """A histogram of the margins; those below zero are mistakes."""
    edges, counts = found["edges"], found["counts"]["margin"]
    wrong = sum(count for high, count in zip(edges[1:], counts, strict=True) if high <= 0)
    about = (
        f"{wrong:,} of {sum(counts):,} pairs are in bins below zero; median about {_median(edges, counts):.3g}, bins "
        f"from {edges[0]:.3g} to {edges[-1]:.3g}"
    )
    chart = Chart(
        key, "Margins, the better response's reward minus the worse one's", about, (edges[0], edges[-1]),
        (0, max(counts)), "margin: better minus worse", "pairs",
    )  # fmt: skip
    for (low, high), count in zip(pairwise(edges), counts, strict=True):
        for kind, start, end in (("wrong", low, min(high, 0.0)), ("right", max(low, 0.0), high)):
            if count and start < end:  # a bin that holds zero has both colors
                (x1, y1), (x2, y2) = chart.at(start, count), chart.at(end, 0)
                chart.body.append(
                    f'<rect class="{kind}" x="{x1}" y="{y1}" width="{max(0.5, x2 - x1):.1f}" height="{y2 - y1:.1f}">'
                    f"<title>{low:.3g} to {high:.3g}: {count:,}</title></rect>"
                )
    if edges[0] < 0 < edges[-1]:
        chart.line("mark", (0, 0), (0, max(counts)))
    return chart.markup([("wrong", "wrong"), ("right", "right")])


def _median(edges: Sequence[float], counts: Sequence[int]) -> float:
    """Middle of the bin that holds the median."""
    place = int(np.searchsorted(np.cumsum(counts), sum(counts) / 2))
    return (edges[place] + edges[place + 1]) / 2


def reliability(key: str, bins: Sequence[Mapping[str, Any]]) -> Markup:
    """Share of right verdicts by the model's confidence, each with its 95% interval; on the diagonal both are equal.

    Bins of few pairs are rings that no line joins, and the axis need not hold them.
    """
    known = [row for row in bins if row["n"]]
    full = [row for row in known if row["n"] >= FEW_PAIRS]
    bounds = [wilson(row["accuracy"] * row["n"], row["n"]) for row in known]
    lowest = min((low for row, (low, _) in zip(known, bounds, strict=True) if row in full or not full), default=0.5)
    start = min(0.5, math.floor(10 * lowest) / 10)
    about = "; ".join(
        f"confidence {row['confidence']:.2f}: right in {row['accuracy']:.2f} of {row['n']:,}" for row in known
    )
    chart = Chart(
        key, "Reliability diagram", about, (0.5, 1.0), (start, 1.0), "confidence, sigmoid(|margin|)",
        "share of right verdicts",
    )  # fmt: skip
    chart.line("mark", (0.5, 1.0), (0.5, 1.0))
    curve = [chart.at(row["confidence"], row["accuracy"]) for row in full]
    chart.body.append(f'<polyline class="curve" points="{" ".join(f"{x},{y}" for x, y in curve)}"/>')
    most = max(row["n"] for row in known)
    for row, (low, high) in zip(known, bounds, strict=True):
        x, y = chart.at(row["confidence"], row["accuracy"])
        is_full = row in full
        chart.line("whisker" if is_full else "faint whisker", (row["confidence"],) * 2, (low, high))
        radius = 2.5 + 4.5 * math.sqrt(row["n"] / most) if is_full else 3.0
        chart.body.append(
            f'<circle class="{"right" if is_full else "ring"}" cx="{x}" cy="{y}" r="{radius:.1f}"><title>confidence '
            f"{row['low']:.2f} to {row['high']:.2f}: right in {row['accuracy']:.1%} of {row['n']:,}</title></circle>"
        )
    return chart.markup()


def lengths(key: str, sample: Sequence[Sequence[float]]) -> Markup:
    """Margin by the difference of length; a verdict by length alone has all points in two opposite quarters."""
    points = np.array(sample, float)
    (x_low, y_low), (x_high, y_high) = np.percentile(points, [_CLIPPED, 100 - _CLIPPED], axis=0)
    x_limit, y_room = max(-x_low, x_high, 1.0), 0.05 * (max(y_high, 0) - min(y_low, 0)) or 1.0
    y_low, y_high = min(y_low, 0) - y_room, max(y_high, 0) + y_room
    by_length = float((points[:, 0] * points[:, 1] > 0).mean())
    about = f"{len(points):,} pairs; in {by_length:.0%} of them the longer response has the higher reward"
    chart = Chart(
        key, "Margin by difference of length", about, (-x_limit, x_limit), (y_low, y_high),
        "characters: better minus worse", "margin",
    )  # fmt: skip
    chart.line("mark", (0, 0), (y_low, y_high))
    chart.line("mark", (-x_limit, x_limit), (0, 0))
    for difference, margin in points.tolist():
        x, y = chart.at(difference, margin)
        kind = "right" if margin > 0 else "wrong"
        chart.body.append(f'<circle class="dot {kind}" cx="{x}" cy="{y}" r="2.6"/>')
    return chart.markup([("dot wrong", "wrong"), ("dot right", "right")])


# ------------------------------------------------------------------------- charts in a cell, beside their figures


def bar(value: float, interval: Sequence[float] | None = None, mark: float | None = 0.5) -> Markup:
    """A share as a bar from 0 to 1, with its interval."""
    parts = [f'<rect class="bar" y="2" width="{_percent(value)}" height="12"/>']
    if interval is not None:
        parts += _whisker(interval)
    return _cell(parts, mark)


def change(before: float, after: float) -> Markup:
    """A share before a change (ring) and after it (dot), from 0 to 1."""
    kind = "fall" if after < before else "rise"
    return _cell(
        [
            f'<line class="{kind}" x1="{_percent(before)}" x2="{_percent(after)}" y1="8" y2="8"/>',
            f'<circle class="ring" cx="{_percent(before)}" cy="8" r="4"/>',
            f'<circle class="{kind}" cx="{_percent(after)}" cy="8" r="4"/>',
        ],
        0.5,
    )


def difference(value: float, interval: Sequence[float], limit: float) -> Markup:
    """A difference of two shares with its interval, from -limit to +limit."""
    place, *ends = ((each / limit + 1) / 2 for each in (value, *interval))
    return _cell([*_whisker(ends), f'<circle class="right" cx="{_percent(place)}" cy="8" r="4"/>'], 0.5)


def _whisker(ends: Sequence[float]) -> list[str]:
    low, high = map(_percent, ends)
    caps = [f'<line class="whisker" x1="{x}" x2="{x}" y1="4" y2="12"/>' for x in (low, high)]
    return [f'<line class="whisker" x1="{low}" x2="{high}" y1="8" y2="8"/>', *caps]


def _cell(parts: Sequence[str], mark: float | None) -> Markup:
    from markupsafe import Markup

    if mark is not None:
        parts = [*parts, f'<line class="mark" x1="{_percent(mark)}" x2="{_percent(mark)}" y1="0" y2="16"/>']
    return Markup(f'<svg class="cell" height="16" aria-hidden="true">{"".join(parts)}</svg>')


def _percent(value: float) -> str:
    return f"{100 * min(1.0, max(0.0, value)):.1f}%"
