"""HelpSteer3 as published: a conversation, two responses, and how much one is preferred, overall and by person.

HelpSteer2's preferences are of the same kind: set `data.columns` to its names (`prompt`, `response_1`, `response_2`,
`preference_strength`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rm_gallery.data.dropped import BadRow
from rm_gallery.data.formats.cells import read_cell
from rm_gallery.data.formats.config import FormatConfig
from rm_gallery.data.formats.draft import Column, Draft
from rm_gallery.data.formats.pairs import check_prompted, read_prompt
from rm_gallery.data.formats.values import is_nothing, read_list, read_number
from rm_gallery.schema import Comparison


def read_helpsteer3(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `helpsteer3`: below 0 the first response is better, above 0 the second; the margin is how far."""
    columns = config.columns
    names = (columns.response1 or "", columns.response2 or "")
    overall = read_number(values.get(columns.overall_preference or ""), columns.overall_preference or "")
    if not -3 <= overall <= 3:
        raise BadRow(f"{columns.overall_preference} outside -3 to 3")
    if overall == 0:
        raise BadRow(f"{columns.overall_preference} that is a tie")
    better = 0 if overall < 0 else 1
    share = _share(values, columns.individual_preference, overall)
    prompt, responses = read_prompt(values, columns.context), [read_cell(values.get(name), name) for name in names]
    check_prompted(prompt, responses, columns.context)
    comparison = Comparison(better, 1 - better, margin=abs(overall), p_better=share)
    return Draft(prompt, responses, (comparison,), names)


def _share(values: Mapping[str, Any], name: str | None, overall: float) -> float | None:
    """Share of people whose preference agrees with the overall one, a tie counting half; None without any."""
    if name is None or is_nothing(values.get(name)):
        return None
    people = read_list(values[name], name)
    if not all(isinstance(person, Mapping) and "score" in person for person in people):
        raise BadRow(f"{name} without a score of each person")
    scores = [read_number(person["score"], f"score in {name}") for person in people if person["score"] is not None]
    if not scores:
        return None
    agree = sum(0.5 if score == 0 else float((score < 0) == (overall < 0)) for score in scores)
    return agree / len(scores)


def helpsteer3_columns(config: FormatConfig) -> list[Column]:
    """Columns of the format `helpsteer3`."""
    columns = config.columns
    return [
        Column("columns.context", columns.context, "cell", needed=columns.context is not None),
        Column("columns.response1", columns.response1, "cell", needed=True),
        Column("columns.response2", columns.response2, "cell", needed=True),
        Column("columns.overall_preference", columns.overall_preference, "number", needed=True),
        Column("columns.individual_preference", columns.individual_preference, "list"),
    ]
