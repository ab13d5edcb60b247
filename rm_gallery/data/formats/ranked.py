"""Rankings: K responses to one prompt with a score or a rank each, compared wherever these differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rm_gallery.data.dropped import BadRow
from rm_gallery.data.formats.cells import Cell, read_cell
from rm_gallery.data.formats.config import FormatConfig
from rm_gallery.data.formats.draft import Column, Draft
from rm_gallery.data.formats.pairs import check_prompted, read_prompt
from rm_gallery.data.formats.values import read_list, read_number
from rm_gallery.schema import Comparison

MAX_RESPONSES = 256
"""Of one row: all of them are compared with each other, and 256 make 32,640 comparisons."""


def read_scored(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `scored`: a list of responses with a list of scores; higher is better, the difference is the margin."""
    prompt, responses = _prompt_and_responses(values, config)
    scores = _numbers(values, config.scores_key or "", len(responses))
    comparisons = compare(scores, f"all {config.scores_key} equal", with_margins=True)
    return Draft(prompt, responses, comparisons, ["response"] * len(responses))


def read_ranked(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `ranked`: a list of responses with a list of ranks; the lowest is best."""
    prompt, responses = _prompt_and_responses(values, config)
    ranks = _numbers(values, config.ranks_key or "", len(responses))
    comparisons = compare([-rank for rank in ranks], f"all {config.ranks_key} equal")
    return Draft(prompt, responses, comparisons, ["response"] * len(responses))


def _prompt_and_responses(values: Mapping[str, Any], config: FormatConfig) -> tuple[Cell, list[Cell]]:
    name = config.responses_key or ""
    cells = read_list(values.get(name), name)
    check_count(cells, name)
    responses = [read_cell(cell, "response") for cell in cells]
    prompt = read_prompt(values, config.prompt_key)
    check_prompted(prompt, responses, config.prompt_key)
    return prompt, responses


def check_count(responses: Sequence[Any], name: str) -> None:
    """Raise BadRow for fewer responses than can be compared, or more than will be."""
    if len(responses) < 2:
        raise BadRow(f"{name} with fewer than 2 responses")
    if len(responses) > MAX_RESPONSES:
        raise BadRow(f"{name} with more than {MAX_RESPONSES} responses")


def _numbers(values: Mapping[str, Any], name: str, count: int) -> list[float]:
    numbers = [read_number(value, f"number in {name}") for value in read_list(values.get(name), name)]
    if len(numbers) != count:
        raise BadRow(f"{name} of another length than the responses")
    return numbers


def compare(values: Sequence[float], when_equal: str, *, with_margins: bool = False) -> list[Comparison]:
    """All comparisons between K responses with these values, higher is better; equal ones are not compared.

    with_margins: the difference of the values is the margin.
    Raises BadRow with the reason `when_equal` when no two differ.
    """
    comparisons = []
    for left in range(len(values)):
        for right in range(left + 1, len(values)):
            better, worse = (left, right) if values[left] > values[right] else (right, left)
            margin = values[better] - values[worse]
            if margin > 0:
                comparisons.append(Comparison(better, worse, margin=margin if with_margins else None))
    if not comparisons:
        raise BadRow(when_equal)
    return comparisons


def scored_columns(config: FormatConfig) -> list[Column]:
    """Columns of the format `scored`."""
    return [
        Column("responses_key", config.responses_key, "list", needed=True),
        Column("scores_key", config.scores_key, "list", needed=True),
        Column("prompt_key", config.prompt_key, "cell"),
    ]


def ranked_columns(config: FormatConfig) -> list[Column]:
    """Columns of the format `ranked`."""
    return [
        Column("responses_key", config.responses_key, "list", needed=True),
        Column("ranks_key", config.ranks_key, "list", needed=True),
        Column("prompt_key", config.prompt_key, "cell"),
    ]
