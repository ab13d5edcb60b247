"""The report in a terminal (80 columns) and as Markdown for a model card."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rm_gallery.evaluation.findings import percent
from rm_gallery.safe_text import visible_line

WIDTH = 80
_MAX_SUBSETS = 12
_FEW_PROMPTS = 20
_SHOWN_MISTAKES = 3

Cells = Sequence[str]


def as_text(evaluation: Mapping[str, Any]) -> str:
    """The report for a terminal, at most 80 columns wide."""
    lines: list[str] = []
    for model in evaluation["models"]:
        about = f", {model['parameters']:,} parameters, {model['dtype']}" if "parameters" in model else ""
        lines += [*_wrapped(f"{model['name']} ({model['kind']}{about})"), ""]
        lines += [*_table(SUMMARY_HEAD, [summary_cells(row) for row in model["sets"]]), ""]
        for row in model["sets"]:
            lines += _set_lines(row)
    if evaluation["comparisons"]:
        lines += ["Comparison", "----------"]
        for row in evaluation["comparisons"]:
            lines += _wrapped(f"{row['set']}: {row['text']}", "  ")
            lines += [line for text in _disagreements(row) for line in _wrapped(text, "    ")]
        lines.append("")
    return "\n".join(visible_line(line).rstrip() for line in lines).rstrip()


SUMMARY_HEAD = ("set", "n", "accuracy", "95% interval", "ties", "margin", "len-ctrl", "ECE")


def summary_cells(row: Mapping[str, Any]) -> Cells:
    """A row of the summary of a model's sets."""
    low, high = row["interval"]
    return (
        row["name"],
        f"{row['n']:,}",
        percent(row["accuracy"]),
        f"{100 * low:.1f} to {100 * high:.1f}",
        f"{100 * row['ties'] / row['n']:.1f}%",
        f"{row['mean_margin']:.3g}",
        percent(row["length"]["controlled"]["accuracy"]),
        f"{row['calibration']['ece']:.3f}",
    )


def _set_lines(row: Mapping[str, Any]) -> list[str]:
    title = visible_line(row["name"])
    lines = [title, "-" * min(len(title), WIDTH)]
    lines += [line for text in facts(row) for line in _wrapped(text, "  ")]
    if row["subsets"]:
        shown = sorted(row["subsets"], key=lambda each: each["accuracy"])[:_MAX_SUBSETS]
        more = len(row["subsets"]) - len(shown)
        head = ("subset" if not more else f"subset (lowest {len(shown)} of {more + len(shown)})", *_SUBSET_HEAD)
        lines += ["", *_table(head, [_subset(each) for each in shown])]
    probes = [each for each in row.get("probes", {}).get("rows", ()) if each.get("n")]
    if probes:
        lines += ["", *_table(PROBE_HEAD, [probe_cells(each) for each in probes])]
        lines += _wrapped(PROBE_NOTE, "  ")
    lines += ["", *(line for each in row["findings"] for line in _finding(each)), ""]
    return lines


_SUBSET_HEAD = ("n", "accuracy", "95% interval", "ties", "margin")


def _subset(row: Mapping[str, Any]) -> Cells:
    low, high = row["interval"]
    ties = f"{100 * row['ties'] / row['n']:.1f}%"
    interval = f"{100 * low:.1f} to {100 * high:.1f}"
    return row["name"], f"{row['n']:,}", percent(row["accuracy"]), interval, ties, f"{row['mean_margin']:.3g}"


PROBE_HEAD = ("probe", "n", "before", "both", "worse", "shift", "verdict")
PROBE_NOTE = (
    "before, both, worse: accuracy as it was, with both responses changed, and with the worse one changed; shift: of a "
    "reward, in standard deviations; verdict: share of pairs whose verdict stays, or that the better response wins"
)


def probe_cells(row: Mapping[str, Any]) -> Cells:
    """A row of the table of probes; empty cells where a figure does not apply."""
    cell = {key: percent(row[key]) for key in ("accuracy", "both", "worse") if key in row}
    if "exchanged" in row:
        cell["both"] = percent(row["exchanged"])
    shift = f"{row['shift']:+.2f}" if "shift" in row else ""
    verdict = percent(row["wins"]) if "wins" in row else percent(1 - row["flips"])
    figures = [cell.get(key, "") for key in ("accuracy", "both", "worse")]
    return (visible_line(row["title"]), f"{row['n']:,}", *figures, shift, verdict)


def facts(row: Mapping[str, Any]) -> Iterator[str]:
    """Sentences with the figures of a set that have no table."""
    for _, text in facts_by_subject(row):
        yield text


def facts_by_subject(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The sentences, each with its subject: a key of the row, or `rows` for how it was read."""
    if "sample_of" in row:
        size = row["groups"] + sum(each["n"] for each in row["unscored"].values())
        yield "rows", f"A random sample of {size:,} of {row['sample_of']:,} rows; --max-pairs sets its size."
    for name, what in (("dropped", "dropped"), ("unscored", "without a reward")):
        for reason, each in row[name].items():
            first = f" (first: {each['first']})" if each["first"] else ""
            yield "rows", f"{each['n']:,} {'row' if each['n'] == 1 else 'rows'} {what}: {reason}{first}."
    if "benchmark" in row:
        for text in _benchmark(row["benchmark"]):
            yield "benchmark", text
    if row["interval_method"] != "wilson":
        few = ", too few for an exact interval" if row["prompts"] < _FEW_PROMPTS else ""
        yield "rows", f"Interval: bootstrap over {row['prompts']:,} prompts, which repeat{few}."
    length = row["length"]
    parts = [
        f"{percent(part['accuracy'])} where the {name} response is better (n = {part['n']:,})"
        for name, part in (("longer", length["when_longer_is_better"]), ("shorter", length["when_shorter_is_better"]))
        if part["n"]
    ]
    if parts:
        correlation = length["correlation"]
        rank = f"; rank correlation of reward and length {correlation:+.2f}" if correlation is not None else ""
        yield "length", f"Length: accuracy {', '.join(parts)}{rank}."
    found = row["calibration"]
    temperature = found["temperature"]
    fitted = f"fitted temperature {temperature:.3g}" if temperature else f"no temperature, {found['temperature_note']}"
    yield "calibration", f"Calibration: Brier score {found['brier']:.3f}, ECE {found['ece']:.3f}, {fitted}."
    baselines = row.get("baselines", {}).get("rows", ())
    if baselines:
        rows = ", ".join(f"{each['title']} {percent(each['accuracy'])}" for each in baselines)
        yield "baselines", f"Baselines: {rows}."
    if row["strength"]:
        steps = ", ".join(f"{span(each)}: {percent(each['accuracy'])} of {each['n']:,}" for each in row["strength"])
        yield "strength", f"By strength of preference: {steps}."
    best = row["best_of_n"]
    if best:
        smallest, largest = best["responses"]
        count = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
        text = (
            f"Best of {count} responses ({best['n']:,} prompts): a best one is chosen in {percent(best['accuracy'])} "
            f"(chance {percent(best['chance'])}); regret {best['regret']:.3g} (chance {best['random_regret']:.3g})."
        )
        yield "best_of_n", text
    if row["mistakes"]:
        worst = [f"{each['where']} (margin {each['margin']:.3g})" for each in row["mistakes"][:_SHOWN_MISTAKES]]
        yield "mistakes", f"Worst mistakes: {', '.join(worst)}; --html and --json have their texts."
    speed = row["throughput"]
    rate = f"{speed['responses_per_second']:,.0f}/s"
    yield "throughput", f"{row['rewards']['n']:,} responses scored in {speed['scoring_seconds']:.1f} s, {rate}."


def _disagreements(row: Mapping[str, Any]) -> Iterator[str]:
    """Where the two models of a comparison disagree most."""
    count = row["only_first_right"] + row["only_second_right"]
    if count and row["disagreements"]:
        first = ", ".join(each["where"] for each in row["disagreements"][:_SHOWN_MISTAKES])
        yield f"One of them alone is right in {count:,} of {row['n']:,} pairs; they disagree most on {first}."


def _benchmark(found: Mapping[str, Any]) -> Iterator[str]:
    score = percent(found["score"]) if found["score"] is not None else "none"
    yield f"{found['title']} score: {score}."
    if "score_with_prior_sets" in found:
        yield f"With the prior sets, at half a section's weight: {percent(found['score_with_prior_sets'])}."
    if found["parts"]:
        yield "; ".join(f"{name} {percent(value)}" for name, value in list(found["parts"].items())[:_MAX_SUBSETS]) + "."
    for note in found["notes"]:
        yield f"Note: {note}."


def span(row: Mapping[str, Any]) -> str:
    """The strengths of preference of a row: one, or from the lowest to the highest."""
    return f"{row['from']:g}" if row["from"] == row["to"] else f"{row['from']:g} to {row['to']:g}"


def _finding(finding: Mapping[str, str]) -> list[str]:
    mark = f"{finding['level']:<9}"
    lines = textwrap.wrap(visible_line(finding["text"]), WIDTH - 11, break_long_words=True)
    lines = [f"  {mark if not place else ' ' * 9}{line}" for place, line in enumerate(lines)]
    return lines + ([*_wrapped(f"try: {finding['advice']}", " " * 11)] if finding["advice"] else [])


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        visible_line(text), WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


def _table(head: Cells, rows: Sequence[Cells]) -> list[str]:
    """Aligned columns; the first one is shortened so that a line fits."""
    every = [tuple(map(visible_line, row)) for row in (head, *rows)]
    widths = [max(len(row[column]) for row in every) for column in range(len(head))]
    widths[0] = min(widths[0], WIDTH - 2 - sum(widths[1:]) - 2 * len(widths[1:]))
    lines = []
    for row in every:
        name = row[0] if len(row[0]) <= widths[0] else row[0][: widths[0] - 3] + "..."
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join([name.ljust(widths[0]), *cells]).rstrip())
    return lines


def as_markdown(evaluation: Mapping[str, Any]) -> str:
    """The report as Markdown, for a model card."""
    lines = ["## Evaluation", ""]
    for model in evaluation["models"]:
        if len(evaluation["models"]) > 1:
            lines += [f"### {_md(model['name'])}", ""]
        lines += [*_md_table(SUMMARY_HEAD, [summary_cells(row) for row in model["sets"]]), ""]
        for row in model["sets"]:
            lines += [f"**{_md(row['name'])}**", "", *(f"- {_md(text)}" for text in facts(row))]
            lines += [f"- {each['level']}: {_md(each['text'])}" for each in row["findings"]] + [""]
            if row["subsets"]:
                lines += [*_md_table(("subset", *_SUBSET_HEAD), [_subset(each) for each in row["subsets"]]), ""]
            probes = [each for each in row.get("probes", {}).get("rows", ()) if each.get("n")]
            if probes:
                lines += [*_md_table(PROBE_HEAD, [probe_cells(each) for each in probes]), "", PROBE_NOTE + ".", ""]
            lines += _md_mistakes(row["mistakes"][:_SHOWN_MISTAKES])
    if evaluation["comparisons"]:
        lines += ["### Comparison", ""]
        for row in evaluation["comparisons"]:
            lines += [
                f"- {_md(row['set'])}: {_md(row['text'])}",
                *(f"    - {_md(text)}" for text in _disagreements(row)),
            ]
        lines.append("")
    made = f"rm-gallery {evaluation['rm_gallery']} evaluate, {evaluation['created'][:10]}"
    lines.append(
        f"Made by {made}. A tie counts as wrong; len-ctrl is accuracy with the length difference controlled for; ECE "
        "is the expected calibration error."
    )
    return "\n".join(lines) + "\n"


def _md(text: str) -> str:
    """Text as Markdown shows it: no mark-up and no HTML of its own."""
    escaped = visible_line(text)
    for mark in "\\`*_[]<>|#":
        escaped = escaped.replace(mark, "\\" + mark)
    return escaped


def _md_table(head: Cells, rows: Sequence[Cells]) -> list[str]:
    lines = [f"| {' | '.join(map(_md, row))} |" for row in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def _md_mistakes(mistakes: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for each in mistakes:
        lines.append(f"- worst mistake, {_md(each['where'])}, margin {each['margin']:.3g}")
        for name in ("prompt", "better", "worse"):
            lines.append(f"    - {name}: {_md(textwrap.shorten(each[name], 300, placeholder=' ...'))}")
    return [*lines, ""] if lines else []
