"""The report of one run or several as a self-contained HTML page, from the template `run_report.html.jinja`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rm_gallery.html_chart import Chart
from rm_gallery.html_page import render
from rm_gallery.training.metric_names import MetricName, parse_metric
from rm_gallery.training.report.findings import findings
from rm_gallery.training.report.history import Points, Run, smooth, thin
from rm_gallery.training.trackers.base import flat

if TYPE_CHECKING:
    from markupsafe import Markup

MARKER = "rm-gallery run report"
"""In the first lines of every page, so that no other file is overwritten."""
MAX_STYLES = 8
"""Series of a chart that look different; later ones start again."""
_MAX_POINTS = 300
_RATE = "Learning rate"


@dataclass(frozen=True)
class _Line:
    """A curve. Training metrics are smoothed; values of validations are dots."""

    label: str
    points: Points
    style: int
    is_dotted: bool = False


def page_of(runs: Sequence[Run]) -> str:
    """The whole file as text: the report of one run, or a comparison of several. All text is escaped."""
    names = _unique([run.name for run in runs])
    charts = [
        (title, _chart(f"c{number}", title, lines, label), lines, note)
        for number, (title, label, lines, note) in enumerate(_charts(runs, names))
    ]
    return render(
        "training/report/run_report.html.jinja",
        MARKER,
        title=names[0] if len(runs) == 1 else f"{len(runs)} runs",
        names=names,
        progress=[_progress(run) for run in runs],
        about=[list(_about(run)) for run in runs],
        findings=[(name, each) for name, run in zip(names, runs, strict=True) for each in findings(run)],
        charts=charts,
        final_rows=_final_rows(runs),
        differences=_differences(runs) if len(runs) > 1 else [],
        data_rows=list(_data_rows(runs[0])) if len(runs) == 1 else [],
        settings=[f"{key}: {value}" for key, value in flat(runs[0].config).items()] if len(runs) == 1 else [],
    )


def _unique(names: Sequence[str]) -> list[str]:
    return [f"{name} ({names[: place + 1].count(name)})" if names.count(name) > 1 else name
            for place, name in enumerate(names)]  # fmt: skip


def _progress(run: Run) -> str:
    step, total = run.history.last_step, run.total_steps
    return f"step {step:,} of {total:,}"


def _about(run: Run) -> Iterator[tuple[str, str]]:
    model = run.facts.get("model")
    name = run.setting("model.partial_pretrain")
    if name:
        size = model.get("parameters") if isinstance(model, Mapping) else None
        yield "model", f"{name}{f', {_count(size)} parameters' if size else ''}"
    if run.config:
        rate = run.setting("optim.lr")
        parts = [
            run.setting("objective.name"),
            run.setting("optim.name"),
            f"learning rate {rate:g} ({run.setting('optim.lr_scheduler')})" if isinstance(rate, float) else "",
            f"{run.setting('data.train_batch_size')} pairs per step",
        ]
        yield "training", ", ".join(str(each) for each in parts if each)
    if "started" in run.facts:
        ranks = run.facts.get("world_size", 1)
        device = f"{run.facts.get('device', '')}{f', {ranks} processes' if ranks != 1 else ''}"
        yield "started", f"{run.facts['started']} on {device}"
    versions = run.facts.get("versions")
    if isinstance(versions, Mapping):
        chosen = [f"{key} {versions[key]}" for key in ("rm-gallery", "torch", "transformers") if key in versions]
        yield "versions", ", ".join(chosen)


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


# --------------------------------------------------------------------------------------------------- charts


def _charts(runs: Sequence[Run], names: Sequence[str]) -> Iterator[tuple[str, str, list[_Line], str]]:
    """(title, label of the axis, lines, note) of each chart that has a line."""
    several = len(runs) > 1
    for kind, title, label in (
        ("loss", "Loss", ""), ("accuracy", "Accuracy", ""), ("score", "Score of benchmarks", ""),
        ("margin", "Margin", "chosen minus rejected"),
    ):  # fmt: skip
        if several:
            for place, what in (("train", "training"), *((f"val{'/' + s if s else ''}", _of(s)) for s in _sets(runs))):
                lines = _of_runs(runs, names, f"{place}/{kind}", is_dotted=place != "train")
                yield f"{title}, {what}", label, lines, ""
        else:
            yield title, label, _of_one(runs[0], kind), ""
    if not several:
        yield "Rewards", "mean reward", _rewards(runs[0]), "Their level drifts freely: the loss sees only differences."
        lines = [
            _Line(_of(each), runs[0].history.points(_metric(each, "length_correlation")), number + 1, True)
            for number, each in enumerate(runs[0].history.sets())
        ]
        yield (
            "Length", "correlation with length", lines,
            "Correlation of reward and length over the pairs; near 1 the longer response is preferred.",
        )  # fmt: skip
    for metric, title, label in (
        ("train/lr", _RATE, ""), ("train/grad_norm", "Gradient norm", "before clipping"),
        ("perf/tokens_per_second", "Throughput", "tokens per second"),
    ):  # fmt: skip
        yield title, label, _of_runs(runs, names if several else ["training"], metric, is_dotted=False), ""


def _of_runs(runs: Sequence[Run], names: Sequence[str], metric: str, *, is_dotted: bool) -> list[_Line]:
    return [
        _Line(name, run.history.points(metric), number, is_dotted)
        for number, (name, run) in enumerate(zip(names, runs, strict=True))
    ]


def _of_one(run: Run, kind: str) -> list[_Line]:
    sets = run.history.sets()
    validated = [_Line(_of(each), run.history.points(_metric(each, kind)), n + 1, True) for n, each in enumerate(sets)]
    return [_Line("training", run.history.points(f"train/{kind}"), 0), *validated]


def _rewards(run: Run) -> list[_Line]:
    start = "val" if run.history.points("val/reward_chosen") else "train"
    return [
        _Line(f"{side}, {'validation' if start == 'val' else 'training'}",
              run.history.points(f"{start}/reward_{side}"), number, start == "val")
        for number, side in enumerate(("chosen", "rejected"))
    ]  # fmt: skip


def _sets(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(each for run in runs for each in run.history.sets()))


def _of(name: str) -> str:
    return name or "validation"


def _metric(name: str, kind: str) -> str:
    return f"val/{name}/{kind}" if name else f"val/{kind}"


def _chart(key: str, title: str, lines: Sequence[_Line], label: str) -> Markup | None:
    """The curves over the steps; None without a point. A line of training metrics is a moving average on its values."""
    drawn = [line for line in lines if line.points]
    if not drawn:
        return None
    values = sorted(
        value for line in drawn for _, value in (line.points if line.is_dotted else thin(line.points, _MAX_POINTS))
    )
    cut = len(values) // 100  # a few outliers must not flatten the rest
    low, high = values[cut], values[-1 - cut]
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    last = max(line.points[-1][0] for line in drawn)
    first = min(line.points[0][0] for line in drawn)
    about = "; ".join(
        f"{line.label}: {line.points[0][1]:.4g} at step {line.points[0][0]}, {line.points[-1][1]:.4g} at step "
        f"{line.points[-1][0]}"
        for line in drawn
    )
    top = high if title.startswith("Accuracy") and high == 1 else high + room
    chart = Chart(key, title, about, (min(0, first), max(last, 1)), (low - room, top), "step", label, tick=_tick)
    for line in drawn:
        style = f"s{line.style % MAX_STYLES}"
        if not line.is_dotted:
            is_exact = title == _RATE
            if not is_exact:
                chart.body.append(_polyline(chart, f"raw {style}", thin(line.points, _MAX_POINTS)))
            averages = line.points if is_exact else smooth(line.points)
            chart.body.append(_polyline(chart, f"curve {style}", thin(averages, _MAX_POINTS)))
            continue
        chart.body.append(_polyline(chart, f"curve {style}", line.points))
        for step, value in thin(line.points, _MAX_POINTS):
            x, y = chart.at(step, value)
            chart.body.append(
                f'<circle class="{style}" cx="{x}" cy="{y}" r="3"><title>step {step}: {value:.4g}</title></circle>'
            )
    return chart.markup()


def _tick(value: float) -> str:
    """E.g. 0.25, 5e-4, 20k."""
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value / 1000:,.4g}k" if abs(value) >= 10_000 else f"{value:,.4g}"


def _polyline(chart: Chart, style: str, points: Points) -> str:
    places = " ".join(f"{x},{y}" for x, y in (chart.at(*each) for each in points))
    return f'<polyline class="{style}" points="{places}"/>'


# --------------------------------------------------------------------------------------------------- tables


def _final_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Metric, then for each run its last value, and the best one with its step if that is another."""
    metrics = list(dict.fromkeys(name for run in runs for name in run.history.series))
    rows = []
    for metric in sorted(metrics, key=lambda name: (not name.startswith("val/"), not name.startswith("train/"))):
        if metric in ("train/epoch", "train/lr", "perf/step_seconds"):
            continue
        row = [metric]
        for run in runs:
            points = run.history.points(metric)
            row.append(_final(points if metric.startswith("val/") else smooth(points), parse_metric(metric)))
        rows.append(row)
    return rows


def _final(points: Points, metric: MetricName | None) -> str:
    if not points:
        return ""
    last = points[-1][1]
    text = f"{last:,.4f}" if abs(last) < 1000 else f"{last:,.0f}"
    if metric is None or not metric.direction or metric.kind == "margin":
        return text
    step, best = max(points, key=lambda each: metric.direction * each[1])
    return text if best == last else f"{text} (best {best:,.4f} at step {step:,})"


def _differences(runs: Sequence[Run]) -> list[list[str]]:
    """Key, then the value of each run, for every setting that is not the same in all; names of runs are no setting."""
    settings = [flat(run.config) for run in runs]
    keys = list(dict.fromkeys(key for each in settings for key in each))
    rows = []
    for key in keys:
        values = ["not set" if key not in each else str(each[key]) for each in settings]
        if len(set(values)) > 1 and key not in ("trainer.experiment_name", "trainer.default_local_dir"):
            rows.append([key, *values])
    return rows


def _data_rows(run: Run) -> Iterator[list[str]]:
    """Name, files, comparisons, tokens and dropped rows of training and validation data and each set."""
    data = run.facts.get("data")
    data = data if isinstance(data, Mapping) else {}
    sets = data.get("eval_sets")
    sides = {"training": data.get("train"), "validation": data.get("val")}
    for name, side in {**sides, **(sets if isinstance(sets, Mapping) else {})}.items():
        if not isinstance(side, Mapping):
            continue
        dropped, files = side.get("dropped"), side.get("files")
        reasons = [
            f"{_count(each.get('rows'))} {reason}"
            for reason, each in (dropped.items() if isinstance(dropped, Mapping) else ())
            if isinstance(each, Mapping)
        ]
        names = [str(each).rpartition("/")[2] for each in (files if isinstance(files, list) else ())]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        counts = [_count(side.get(key, "")) for key in ("comparisons", "tokens")]
        yield [name, shown, *counts, "; ".join(reasons) or "none"]
