"""Columns that a format does not read, although they look like input or like a label.

Input that is not read is a warning. A label that contradicts the columns of the responses is an error: the model would
learn the wrong preference in some rows, and nothing would show it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from rm_gallery.data.formats.cells import Cell, is_number, kind_of, read_cell
from rm_gallery.data.formats.config import FormatConfig
from rm_gallery.data.formats.pairs import Draft
from rm_gallery.data.sources import Row
from rm_gallery.errors import BadRow

_INPUT = {
    "prompt", "prompts", "question", "questions", "query", "queries", "instruction", "instructions", "input",
    "inputs", "context", "contexts", "problem", "user", "conversation", "conversations", "dialog", "dialogue",
    "messages", "history", "system", "document", "documents", "article", "passage", "passages", "post", "background",
    "turns", "request", "persona",
}  # fmt: skip
_ABOUT = {
    "id", "ids", "uid", "uuid", "url", "uri", "link", "source", "sources", "src", "origin", "type", "kind", "lang",
    "language", "model", "models", "name", "names", "count", "num", "n", "len", "length", "hash", "sha", "sha256",
    "score", "scores", "category", "categories", "tokens", "domain", "subset", "split", "date", "time", "timestamp",
    "rank", "rating", "ratings", "label", "labels", "status", "author", "version", "key", "topic", "tag", "tags",
    "level", "group", "index", "format", "license", "metadata", "meta", "title",
}  # fmt: skip
_SAID_ABOUT = {
    "feedback", "rationale", "critique", "critic", "explanation", "comment", "comments", "reason", "reasons",
    "reasoning", "annotation", "annotations", "annotator", "annotators", "statement", "elaboration", "judge",
    "judgement", "judgment", "judgements", "judgments", "grader", "labelling", "labeling", "labeler", "note", "notes",
    "review", "analysis", "response", "responses", "completion", "completions", "answer", "answers", "output",
    "outputs", "generation", "generations", "reference", "gold", "chosen", "rejected", "better", "worse", "thinking",
    "trace", "evaluation", "summary", "description", "justification", "solution",
}  # fmt: skip
_LABELS = re.compile(
    r"(^|_)(better|worse|safer|winner|winners|win|loser|choice|chosen|preferred|preference|preferences|label|labels|"
    r"best|vote|votes|verdict|selected|gold)(_|$)"
)
_SIDED_SCORES = re.compile(r"(score|rating|reward|rank|helpfulness)s?_(0|1|2|a|b)$")
_SIDES = ({"0", "1"}, {"1", "2"}, {"a", "b"}, {"left", "right"}, {"first", "second"}, {"one", "two"}, {"x", "y"})
_SIDE = re.compile(r"((model|response|answer|assistant|completion|output)[_ -]?)?([abAB]|[012])|tie|left|right")
_MAX_LABEL_CHARS = 40
_MIN_WORDS = 3
_SURELY_INPUT = {"prompt", "instruction", "question", "query"}
"""Columns in which one word is enough."""


def find_labels(rows: Sequence[Row], read: Collection[str | None] = ()) -> list[str]:
    """Columns of these rows that look like a label of two responses.

    read: columns that are read, which are labels only if they hold nothing but sides, as `A`.
    """
    names = dict.fromkeys(name for row in rows for name in row.values)
    return [name for name in names if _is_label(name, [row.values.get(name) for row in rows], name in read)]


def _is_label(name: str, values: Sequence[Any], is_read: bool) -> bool:
    if not (_LABELS.search(_lower(name)) or _SIDED_SCORES.search(_lower(name))):
        return False
    filled = [value for value in values if value is not None]
    if is_read:
        return bool(filled) and all(isinstance(value, str) and _SIDE.fullmatch(value.strip()) for value in filled)
    return bool(filled) and all(
        isinstance(value, bool) or is_number(value) or (isinstance(value, str) and len(value) <= _MAX_LABEL_CHARS)
        for value in filled
    )


def are_sides(first: str, second: str) -> bool:
    """Whether two names say which side a response is on, not whether it is good: `response_0` and `response_1`."""
    left, right = (re.findall(r"[a-z]+|[0-9]+", _lower(name)) for name in (first, second))
    differ = [{one, other} for one, other in zip(left, right, strict=False) if one != other]
    return len(left) == len(right) and len(differ) == 1 and differ[0] in _SIDES


def _lower(name: str) -> str:
    """snake_case: `scoreA` and `score-a` are `score_a`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_").replace(" ", "_")


def find_unread_inputs(
    rows: Sequence[tuple[Row, Draft]], read: Collection[str], config: FormatConfig
) -> Iterator[tuple[str, str, str]]:
    """Columns that look like input and are not read: (column, what it holds, the key that reads it).

    rows: rows with what their format reads. A column whose text is part of what is read is no input of its own.
    Names decide among columns of text; where no row has a prompt, so does the text: some words, unless the name is that
    of a remark or of metadata.
    """
    names = dict.fromkeys(name for row, _ in rows for name in row.values if name not in read)
    has_prompt = any(draft.prompt or not all(isinstance(each, str) for each in draft.responses) for _, draft in rows)
    for name in names:
        words = set(re.findall(r"[a-z]+[0-9]*", _lower(name)))
        filled = [(row.values[name], draft) for row, draft in rows if row.values.get(name) not in (None, "", [])]
        least = 1 if name.lower() in _SURELY_INPUT else _MIN_WORDS
        holding = [(value, draft) for value, draft in filled if _is_input(value, least)]
        if words & (_ABOUT | _SAID_ABOUT) or len(holding) * 2 < len(filled) or not holding:
            continue
        first = holding[0][0][0] if isinstance(holding[0][0], list) else holding[0][0]
        is_text = isinstance(first, str) and kind_of(first) == "text"
        if (
            is_text
            and not words & _INPUT
            and (has_prompt or (len(rows) > 1 and all(value == holding[0][0] for value, _ in holding)))
        ):
            continue
        if sum(_is_part(value, draft) for value, draft in holding) * 2 >= len(holding):
            continue
        key = "system_key" if "system" in words else "history_key" if "history" in words else "prompt_key"
        if getattr(config, key) is not None:
            yield name, "text" if is_text else "messages", key


def _is_input(value: Any, least: int) -> bool:
    """Messages, or text of at least this number of words, also as a list."""
    if isinstance(value, str):
        return kind_of(value) == "json" or len(value.split(maxsplit=least)) >= least
    items = value if isinstance(value, list) else [value]
    if items and all(isinstance(item, str) for item in items):
        return any(_is_input(item, least) for item in items)
    is_turns = all(isinstance(item, Mapping) and ("role" in item or {"from", "value"} <= item.keys()) for item in items)
    return bool(items) and is_turns


def _is_part(value: Any, draft: Draft) -> bool:
    """Whether each text of the value is part of the prompt or of a response."""
    known = "\n".join(text for part in (draft.prompt, *draft.responses) for text in _texts(part))
    try:
        cell = value if isinstance(value, list) and isinstance(value[0], str) else read_cell(value, "", required=False)
    except BadRow:
        return False
    return all(text.strip() in known for text in _texts(cell))


def _texts(cell: Cell | list[str]) -> list[str]:
    parts = [cell] if isinstance(cell, str) else cell
    return [part if isinstance(part, str) else part.get("content") or "" for part in parts]
