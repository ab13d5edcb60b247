"""The report as one self-contained HTML file, from the template `report.html.jinja`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rm_gallery.evaluation import charts
from rm_gallery.evaluation.findings import LEVELS, percent
from rm_gallery.evaluation.metrics import Z
from rm_gallery.evaluation.report import (
    PROBE_HEAD,
    PROBE_NOTE,
    SUMMARY_HEAD,
    facts_by_subject,
    probe_cells,
    span,
    summary_cells,
)
from rm_gallery.html_page import render

MARKER = "rm-gallery evaluate"
"""In the first lines of every report, so that no other file is overwritten."""
MAX_SUBSETS = 200
_PREVIEW = 90

_SCRIPT = """
for (const box of document.querySelectorAll(".search")) {
  const [input, button, status] = box.querySelectorAll("input, button, output");
  const texts = [...box.parentElement.querySelectorAll("details")];
  const words = texts.map(each => each.textContent.toLowerCase());
  const show = () => {
    const wanted = input.value.trim().toLowerCase();
    texts.forEach((each, place) => { each.hidden = !words[place].includes(wanted); });
    const found = texts.filter(each => !each.hidden).length;
    status.textContent = wanted ? `${found} of ${texts.length}` : "";
  };
  input.addEventListener("input", show);
  button.addEventListener("click", () => {
    const open = texts.some(each => !each.hidden && !each.open);
    texts.forEach(each => { each.open = open; });
  });
  box.hidden = false;
}
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  closed.forEach(each => { each.open = true; });
});
addEventListener("afterprint", () => { closed.forEach(each => { each.open = false; }); });
"""


def html_of(evaluation: Mapping[str, Any], *, command: str = "") -> str:
    """The whole file as text. All text is escaped, and control characters are made visible.

    command: the command line that made the report, if any.
    """
    return render(
        "evaluation/report.html.jinja",
        MARKER,
        script=_SCRIPT,
        evaluation=evaluation,
        about=[*_about(evaluation), *([("command", command)] if command else [])],
        findings=_findings(evaluation),
        summaries=_summaries(evaluation),
        charts=charts,
        accuracies=_accuracies,
        comparison_head=_comparison_head(evaluation["comparisons"]),
        comparison_rows=_comparison_rows(evaluation["comparisons"]),
        notes=_notes,
        percent=percent,
        preview=lambda text: textwrap.shorten(text[: 4 * _PREVIEW], _PREVIEW, placeholder=" ..."),
        probe_head=PROBE_HEAD,
        probe_note=PROBE_NOTE,
        probe_rows=lambda rows: [_probe_row(each) for each in rows if each.get("n")],
        several=sum(len(model["sets"]) for model in evaluation["models"]) > 1,
        title="Reward model evaluation" if len(evaluation["models"]) == 1 else "Reward model comparison",
    )


def _about(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for model in evaluation["models"]:
        more = (
            f", {model['parameters']:,} parameters, {model['dtype']}, {model['device']}"
            if "parameters" in model
            else ""
        )
        yield "model", f"{model['name']} ({model['kind']}{more}): {model['source']}"
    for row in evaluation["models"][0]["sets"]:
        yield "set", f"{row['name']} ({row['n']:,} comparisons, {row['prompts']:,} prompts): {row['source']}"
    versions = ", ".join(f"{name} {version}" for name, version in evaluation["versions"].items())
    yield (
        "made",
        f"{evaluation['created'][:16].replace('T', ' ')} UTC by rm-gallery {evaluation['rm_gallery']}; {versions}",
    )


def _findings(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """The findings of all sets, errors first, each with the section that it is about."""
    found = [
        {**finding, "section": f"m{number}s{place}", "about": _title(evaluation, model, row)}
        for number, model in enumerate(evaluation["models"])
        for place, row in enumerate(model["sets"])
        for finding in row["findings"]
    ]
    return sorted(found, key=lambda finding: LEVELS[finding["level"]])


def _title(evaluation: Mapping[str, Any], model: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    return row["name"] if len(evaluation["models"]) == 1 else f"{row['name']}, {model['name']}"


def _summaries(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One table with the sets of a single model, or a table with the models for each set."""
    models = evaluation["models"]
    head = ("model" if len(models) > 1 else "set", *SUMMARY_HEAD[1:], "0 to 100%")
    if len(models) == 1:
        return [{"title": "", "head": head, "rows": [_summary(row, row["name"]) for row in models[0]["sets"]]}]
    return [
        {"title": row["name"], "head": head, "rows": [_summary(each["sets"][place], each["name"]) for each in models]}
        for place, row in enumerate(models[0]["sets"])
    ]


def _summary(row: Mapping[str, Any], name: str) -> tuple[Sequence[str], Any]:
    return (name, *summary_cells(row)[1:]), charts.bar(row["accuracy"], row["interval"])


def _accuracies(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[tuple[Sequence[str], Any]]:
    """Cells and bars of accuracies with their number of pairs and 95% interval."""
    return [
        (
            (
                name,
                f"{row['n']:,}",
                percent(row["accuracy"]),
                f"{100 * row['interval'][0]:.1f} to {100 * row['interval'][1]:.1f}",
            ),
            charts.bar(row["accuracy"], row["interval"]),
        )
        for row, name in zip(rows, names, strict=True)
    ]


def _notes(row: Mapping[str, Any]) -> dict[str, list[str]]:
    """Sentences on a set by subject, and the tables of accuracies."""
    found: dict[str, Any] = {}
    for subject, text in facts_by_subject(row):
        found.setdefault(subject, []).append(text)
    found["subset_rows"] = sorted(row["subsets"], key=lambda each: each["accuracy"])[:MAX_SUBSETS]
    found["strength_names"] = [span(each) for each in row["strength"]]
    model = {"title": "this model", **{key: row[key] for key in ("n", "accuracy", "interval")}}
    found["baseline_rows"] = [model, *map(_with_interval, row.get("baselines", {}).get("rows", ()))]
    return found


def _with_interval(baseline: Mapping[str, Any]) -> dict[str, Any]:
    half = Z * baseline["standard_error"]
    accuracy = baseline["accuracy"]
    return {**baseline, "interval": [max(0.0, accuracy - half), min(1.0, accuracy + half)]}


def _probe_row(probe: Mapping[str, Any]) -> tuple[Sequence[str], Any]:
    """Cells of a probe, and its effect as a picture."""
    if "wins" in probe:
        return probe_cells(probe), charts.bar(probe["wins"], probe["interval"])
    after = next(probe[key] for key in ("exchanged", "worse", "both") if key in probe)
    return probe_cells(probe), charts.change(probe["accuracy"], after)


def _limit(comparisons: Sequence[Mapping[str, Any]]) -> float:
    """End of the common scale of the differences: at least one point, and beyond every interval."""
    return max([0.01, *(1.05 * abs(end) for each in comparisons for end in each["interval"])])


def _comparison_head(comparisons: Sequence[Mapping[str, Any]]) -> Sequence[str]:
    points = f"{100 * _limit(comparisons):.1f}"
    return (
        "set: model against reference",
        "n",
        "reference",
        "model",
        "difference",
        "95% interval",
        "McNemar p",
        f"-{points} to +{points} points",
    )


def _comparison_rows(comparisons: Sequence[Mapping[str, Any]]) -> list[tuple[Sequence[str], Any]]:
    rows: list[tuple[Sequence[str], Any]] = []
    for each in comparisons:
        (first, second), (low, high) = each["models"], (100 * end for end in each["interval"])
        cells = (
            f"{each['set']}: {second} against {first}", f"{each['n']:,}", *map(percent, each["accuracy"]),
            f"{100 * each['difference']:+.1f}", f"{low:+.1f} to {high:+.1f}", f"{each['p_value']:.2g}",
        )  # fmt: skip
        rows.append((cells, charts.difference(each["difference"], each["interval"], _limit(comparisons))))
    return rows
