"""Nested responses: a list of records, each a response with its label or score.

Format `nested`: `input` and `output: [{answer: {role, content, label: {is_preferred: true}}}, ...]`, with or without
`answer`. Format `completions`, as in UltraFeedback: `instruction` and `completions: [{response, overall_score}, ...]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rm_gallery.data.dropped import BadRow
from rm_gallery.data.formats.cells import Cell, read_cell
from rm_gallery.data.formats.config import FormatConfig
from rm_gallery.data.formats.draft import Column, Draft
from rm_gallery.data.formats.pairs import check_prompted, read_prompt
from rm_gallery.data.formats.ranked import check_count, compare
from rm_gallery.data.formats.values import is_number, read_list, read_number
from rm_gallery.schema import Comparison, Message

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
