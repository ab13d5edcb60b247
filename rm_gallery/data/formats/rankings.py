"""Rankings: K responses to one prompt with a score, a rank or a label each, compared wherever these differ.

`ranked`: lists of responses and of scores or ranks. `nested`: `input` and `output: [{answer: {role, content, label:
{is_preferred: true}}}, ...]`, with or without `answer`. `completions`, as in UltraFeedback: `instruction` and
`completions: [{response, overall_score}, ...]`.

`helpsteer3`, as published: a conversation, two responses, and how much one is preferred, overall and by person.
HelpSteer2's preferences are of the same kind: set `data.columns` to its names (`prompt`, `response_1`, `response_2`,
`preference_strength`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rm_gallery.data.formats.cells import Cell, is_nothing, is_number, read_cell, read_list, read_number
from rm_gallery.data.formats.config import FormatConfig
from rm_gallery.data.formats.pairs import Column, Draft, check_prompted, read_prompt
from rm_gallery.errors import BadRow
from rm_gallery.schema import Comparison, Message

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


_TEXTS = ("content", "text", "response", "response_text", "completion", "answer")
# In this order. UltraFeedback's overall score is known to be 10 in places where 1 was meant, so it comes last.
_LABELS = (
    "label", "is_preferred", "preference", "preference_score", "score", "reward", "total_score",
    "fine-grained_score", "overall_score",
)  # fmt: skip
_WORDS = {"chosen": True, "rejected": False}


def read_nested(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `nested`."""
    return _read(values, config, config.columns.input, config.columns.output)


def read_completions(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `completions`; the prompt is in `instruction` or, in a file without it, in the usual prompt column."""
    has_instruction = config.columns.instruction is not None and config.columns.instruction in values
    prompt = config.columns.instruction if has_instruction else config.prompt_key
    return _read(values, config, prompt, config.columns.completions)


def _read(values: Mapping[str, Any], config: FormatConfig, prompt: str | None, name: str | None) -> Draft:
    name = name or ""
    records = read_list(values.get(name), name)
    check_count(records, name)
    responses, preferred, scores = [], [], []
    for record in records:
        if not isinstance(record, Mapping):
            raise BadRow(f"{name} with a response that is no record")
        fields = _flat(record)
        responses.append(_response(fields, name))
        label, score = _verdict(fields, name, config.columns.score)
        preferred.append(label)
        scores.append(score)
    before = read_prompt(values, prompt)
    check_prompted(before, responses, prompt)
    return Draft(before, responses, _comparisons(preferred, scores, name), ["response"] * len(responses))


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record that are there; those of its `answer`, when that is a record too, before its own."""
    answer = record.get("answer")
    inner = answer if isinstance(answer, Mapping) else {}
    fields = {key: value for key, value in record.items() if value is not None and value is not inner}
    return fields | {key: value for key, value in inner.items() if value is not None}


def _response(fields: Mapping[str, Any], name: str) -> Cell:
    """The answer as text, or as an assistant turn when it holds parts or calls tools, or as a conversation."""
    value = next((fields[key] for key in _TEXTS if key in fields), None)
    role, calls = fields.get("role", "assistant"), fields.get("tool_calls")
    if isinstance(value, str) and role == "assistant" and not calls:
        return read_cell(value, "response")
    if isinstance(value, list) and any(isinstance(item, Mapping) and "role" in item for item in value):
        return read_cell(value, "response")
    if value is None and not calls:
        raise BadRow(f"{name} with a response that has no text")
    message: Message = {"role": role, "content": value, "tool_calls": calls}
    return read_cell([message], "response")


def _verdict(fields: Mapping[str, Any], name: str, chosen_field: str | None) -> tuple[bool | None, float | None]:
    """Whether a response is preferred, and its score, as far as its record says so.

    chosen_field: the one field that holds the score, from `data.columns.score`; None looks into all that are known.
    """
    if chosen_field is not None:
        return None, read_number(fields.get(chosen_field), f"{chosen_field} in {name}")
    preferred, score = None, None
    for key in _LABELS:
        value = fields.get(key)
        label: bool | None = None
        number: float | None = None
        if isinstance(value, bool):
            label = value
        elif isinstance(value, Mapping):
            label, number = _verdict(value, name, None)
        elif isinstance(value, str) and not is_number(value):
            label = _WORDS.get(value.strip().lower())
        elif is_number(value):
            number = read_number(value, f"{key} in {name}")
        preferred = label if preferred is None else preferred
        score = number if score is None else score
    return preferred, score


def _comparisons(preferred: list[bool | None], scores: list[float | None], name: str) -> list[Comparison]:
    """By label where labels differ, else by score.

    With labels the margin is how much higher the preferred one's score is, if it is. Two responses with the same
    score other than 0 hold, as HelpSteer3 in this form does, the strength of the preference between them.
    """
    labels = [float(label) for label in preferred if label is not None]
    numbers = [score for score in scores if score is not None]
    has_labels, has_scores = len(labels) == len(preferred), len(numbers) == len(scores)
    if has_labels and len(set(labels)) > 1:
        comparisons = compare(labels, "")
        if has_scores:
            comparisons = [_with_margin(each, numbers) for each in comparisons]
        return comparisons
    if has_scores:
        return compare(numbers, f"all labels or scores in {name} equal", with_margins=True)
    raise BadRow(f"all labels in {name} equal" if has_labels else f"{name} with a response that has no label or score")


def _with_margin(comparison: Comparison, scores: list[float]) -> Comparison:
    margin = scores[comparison.better] - scores[comparison.worse]
    if margin == 0 and len(scores) == 2 and scores[0]:
        margin = abs(scores[0])
    return replace(comparison, margin=margin) if margin > 0 else comparison


def nested_columns(config: FormatConfig) -> list[Column]:
    """Columns of the format `nested`."""
    return [
        Column("columns.input", config.columns.input, "cell", needed=True),
        Column("columns.output", config.columns.output, "list", needed=True),
    ]


def completions_columns(config: FormatConfig) -> list[Column]:
    """Columns of the format `completions`."""
    return [
        Column("columns.completions", config.columns.completions, "list", needed=True),
        Column("columns.instruction", config.columns.instruction, "cell"),
        Column("prompt_key", config.prompt_key, "cell"),
    ]


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
