"""Rankings: K responses to one prompt with a score, a rank or a label each, compared wherever these differ.

`scored`, `ranked`: lists of responses and of scores or ranks. `nested`: `input` and `output: [{answer: {role, content,
label: {is_preferred: true}}}, ...]`, with or without `answer`. `completions`, as in UltraFeedback: `instruction` and
`completions: [{response, overall_score}, ...]`.

Nectar is `nested` under other names, with ranks in place of scores.

`helpsteer3`, as published: a conversation, two responses, and how much one is preferred, overall and per annotator.
HelpSteer2's preferences have the same layout under other names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rm_gallery.data.formats.cells import Cell, is_nothing, is_number, read_list, read_number
from rm_gallery.data.formats.config import FormatConfig, ResponsesConfig
from rm_gallery.data.formats.pairs import MAX_RESPONSES, Draft, prompted, read_response
from rm_gallery.data.formats.prompts import read_column
from rm_gallery.errors import BadRow
from rm_gallery.schema import Comparison, Message, Rating


def read_responses(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Formats `scored`, `ranked` and `responses`: a list of responses to one prompt."""
    name = config.responses_key or ""
    responses = [read_response(cell, "response", config) for cell in read_list(values.get(name), name)]
    return prompted(values, config, responses, ["response"] * len(responses))


def compare_scores(values: Mapping[str, Any], config: FormatConfig, count: int) -> list[Comparison]:
    """Format `scored`: higher is better, the difference is the margin."""
    _check_count(count, config.responses_key)
    scores = _numbers(values, config.scores_key or "", count)
    return compare(scores, f"all {config.scores_key} equal", with_margins=True, ties=config.ties)


def compare_ranks(values: Mapping[str, Any], config: FormatConfig, count: int) -> list[Comparison]:
    """Format `ranked`: the lowest rank is best."""
    _check_count(count, config.responses_key)
    ranks = _numbers(values, config.ranks_key or "", count)
    return compare([-rank for rank in ranks], f"all {config.ranks_key} equal", ties=config.ties)


def rate_scores(values: Mapping[str, Any], config: FormatConfig, count: int) -> list[Rating]:
    """Format `scored`: the score of each response."""
    scores = _numbers(values, config.scores_key or "", count)
    return [Rating(response, score=score) for response, score in enumerate(scores)]


def rate_ranks(values: Mapping[str, Any], config: FormatConfig, count: int) -> list[Rating]:
    """Format `ranked`: the rank of each response."""
    ranks = _numbers(values, config.ranks_key or "", count)
    return [Rating(response, rank=rank) for response, rank in enumerate(ranks)]


def _check_count(count: int, name: str | None) -> None:
    if count < 2:
        raise BadRow(f"{name} with fewer than 2 responses")
    if count > MAX_RESPONSES:
        raise BadRow(f"{name} with more than {MAX_RESPONSES} responses")


def _numbers(values: Mapping[str, Any], name: str, count: int) -> list[float]:
    numbers = [read_number(value, f"number in {name}") for value in read_list(values.get(name), name)]
    if len(numbers) != count:
        raise BadRow(f"{name} of a different length than the responses")
    return numbers


def compare(
    values: Sequence[float], when_equal: str, *, with_margins: bool = False, ties: bool = False
) -> list[Comparison]:
    """All comparisons between K responses with these values, higher is better.

    with_margins: use the difference of the values as the margin. ties: equal values are tied comparisons; otherwise
    they are not compared, and BadRow with the reason `when_equal` is raised if no two values differ.
    """
    comparisons = []
    for left in range(len(values)):
        for right in range(left + 1, len(values)):
            better, worse = (left, right) if values[left] > values[right] else (right, left)
            margin = values[better] - values[worse]
            if margin > 0 or ties:
                comparisons.append(Comparison(better, worse, margin=margin if with_margins else None, tied=not margin))
    if not comparisons:
        raise BadRow(when_equal)
    return comparisons


_TEXTS = ("content", "text", "response", "response_text", "completion", "answer")
# In this order. UltraFeedback's overall score is known to be 10 in places where 1 was meant, so it comes last.
_LABELS = (
    "label", "is_preferred", "preference", "preference_score", "score", "reward", "total_score",
    "fine-grained_score", "overall_score",
)  # fmt: skip
_WORDS = {"chosen": True, "rejected": False}


def read_nested(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `nested`."""
    responses = _responses(values, config.columns.output, config)
    prompt = read_column(values, config.columns.input)
    return Draft(_turns_of(prompt), responses, ["response"] * len(responses), config.columns.input)


def _turns_of(prompt: Cell) -> Cell:
    """A prompt that Anthropic's markers divide into turns, as in Nectar: `\\n\\nHuman: hi\\n\\nAssistant: `."""
    if not isinstance(prompt, str) or not (prompt.startswith("\n\nHuman: ") and prompt.endswith("\n\nAssistant: ")):
        return prompt
    said = re.split(r"\n\n(Human|Assistant): ", prompt)[1:-2]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": text.strip()} for who, text in zip(said[::2], said[1::2], strict=True)]


def read_completions(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `completions`; the prompt is in `instruction` or, in a file without it, in the usual prompt column."""
    has_instruction = config.columns.instruction is not None and config.columns.instruction in values
    responses = _responses(values, config.columns.completions, config)
    first = config.columns.instruction if has_instruction else None
    return prompted(values, config, responses, ["response"] * len(responses), first=first)


def _responses(values: Mapping[str, Any], name: str | None, config: FormatConfig) -> list[Cell]:
    return [_response(fields, name or "", config) for fields in _records(values, name or "")]


def _records(values: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The fields of each response."""
    records = read_list(values.get(name), name)
    if not all(isinstance(record, Mapping) for record in records):
        raise BadRow(f"{name} with a response that is not a record")
    return [_flat(record) for record in records]


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record that are not null; those of its `answer`, if that is a record too, take precedence."""
    answer = record.get("answer")
    inner = answer if isinstance(answer, Mapping) else {}
    fields = {key: value for key, value in record.items() if value is not None and value is not inner}
    return fields | {key: value for key, value in inner.items() if value is not None}


def _response(fields: Mapping[str, Any], name: str, config: FormatConfig) -> Cell:
    """The answer: text, an assistant turn if it holds parts or calls tools, or a conversation."""
    value = next((fields[key] for key in _TEXTS if key in fields), None)
    role, calls = fields.get("role", "assistant"), fields.get("tool_calls")
    if isinstance(value, str) and role == "assistant" and not calls:
        return read_response(value, "response", config)
    if isinstance(value, list) and any(isinstance(item, Mapping) and "role" in item for item in value):
        return read_response(value, "response", config)
    if value is None and not calls:
        raise BadRow(f"{name} with a response that has no text")
    message: Message = {"role": role, "content": value, "tool_calls": calls}
    return read_response([message], "response", config)


def compare_nested(values: Mapping[str, Any], config: FormatConfig, count: int) -> list[Comparison]:
    """Format `nested`: by the label or score of each response."""
    return _compare_records(values, config.columns.output or "", config)


def compare_completions(values: Mapping[str, Any], config: FormatConfig, count: int) -> list[Comparison]:
    """Format `completions`: by the score of each response."""
    return _compare_records(values, config.columns.completions or "", config)


def _compare_records(values: Mapping[str, Any], name: str, config: FormatConfig) -> list[Comparison]:
    records, score_field = _records(values, name), config.columns.score
    _check_count(len(records), name)
    unlabelled = all(fields.keys().isdisjoint(_LABELS) for fields in records)
    if score_field == "rank" or (score_field is None and unlabelled and any("rank" in fields for fields in records)):
        ranks = [read_number(fields.get("rank"), f"rank in {name}") for fields in records]
        return compare([-rank for rank in ranks], f"all ranks in {name} equal", ties=config.ties)
    verdicts = [_verdict(fields, name, score_field) for fields in records]
    return _comparisons([label for label, _ in verdicts], [score for _, score in verdicts], name, ties=config.ties)


def _verdict(fields: Mapping[str, Any], name: str, score_field: str | None) -> tuple[bool | None, float | None]:
    """Whether a response is preferred, and its score; None for what is missing in its record.

    score_field: the only field to read, from `data.columns.score`; None reads all known fields.
    """
    if score_field is not None:
        return None, read_number(fields.get(score_field), f"{score_field} in {name}")
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


def _comparisons(
    preferred: list[bool | None], scores: list[float | None], name: str, *, ties: bool
) -> list[Comparison]:
    """By label where labels differ, else by score.

    ties: equal scores are tied comparisons, and so are two responses with the same label and no scores. Of more
    responses a label does not say that any two are equally good.

    With labels, the margin is the difference of the scores if it is positive. Two responses with the same score other
    than 0 hold the strength of the preference between them, as HelpSteer3 in this layout does: scores 2 and 2 with
    labels true and false give a margin of 2.
    """
    labels = [float(label) for label in preferred if label is not None]
    numbers = [score for score in scores if score is not None]
    has_labels, has_scores = len(labels) == len(preferred), len(numbers) == len(scores)
    if has_labels and len(set(labels)) > 1:
        comparisons = compare(labels, "")
        return [_with_margin(each, numbers) for each in comparisons] if has_scores else comparisons
    if has_scores:
        return compare(numbers, f"all labels or scores in {name} equal", with_margins=True, ties=ties)
    if has_labels and ties and len(labels) == 2:
        return [Comparison(0, 1, tied=True)]
    raise BadRow(f"all labels in {name} equal" if has_labels else f"{name} with a response that has no label or score")


def _with_margin(comparison: Comparison, scores: list[float]) -> Comparison:
    margin = scores[comparison.better] - scores[comparison.worse]
    if margin == 0 and len(scores) == 2 and scores[0]:
        margin = abs(scores[0])
    return replace(comparison, margin=margin) if margin > 0 else comparison


def read_helpsteer3(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `helpsteer3`: two responses to a conversation."""
    columns = config.columns
    names = (columns.response1 or "", columns.response2 or "")
    responses = [read_response(values.get(name), name, config) for name in names]
    return Draft(read_column(values, columns.context), responses, names, columns.context)


def compare_helpsteer3(values: Mapping[str, Any], config: FormatConfig, count: int) -> list[Comparison]:
    """Below 0 the first response is better, above 0 the second; the distance from 0 is the margin."""
    name = config.columns.overall_preference or ""
    overall = read_number(values.get(name), name)
    if not -3 <= overall <= 3:
        raise BadRow(f"{name} outside -3 to 3")
    if overall == 0 and not config.ties:
        raise BadRow(f"{name} that is a tie")
    better = 0 if overall <= 0 else 1
    share = _agreement(values, config.columns.individual_preference, overall) if overall else None
    return [Comparison(better, 1 - better, margin=abs(overall), p_better=share, tied=not overall)]


def _agreement(values: Mapping[str, Any], name: str | None, overall: float) -> float | None:
    """Share of annotators whose preference agrees with the overall one, a tie counting half; None without any."""
    if name is None or is_nothing(values.get(name)):
        return None
    annotators = read_list(values[name], name)
    if not all(isinstance(each, Mapping) and "score" in each for each in annotators):
        raise BadRow(f"{name} without a score of each annotator")
    scores = [read_number(each["score"], f"score in {name}") for each in annotators if each["score"] is not None]
    if not scores:
        return None
    agree = sum(0.5 if score == 0 else float((score < 0) == (overall < 0)) for score in scores)
    return agree / len(scores)


def read_single(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `response`: one response to a prompt."""
    name = _scoring(config).response_key or ""
    return prompted(values, config, [read_response(values.get(name), name, config)], [name])


def read_conversation(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `conversation`: messages, the last of which is the response."""
    name = _scoring(config).messages_key or ""
    messages = read_response(values.get(name), name, config)
    if not messages or isinstance(messages, str):
        raise BadRow(f"{name} that are text" if messages else f"empty {name}")
    return Draft("", [messages], [name])


def _scoring(config: FormatConfig) -> ResponsesConfig:
    assert isinstance(config, ResponsesConfig), "a layout without preferences is read with a ResponsesConfig"
    return config
