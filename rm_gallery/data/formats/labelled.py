"""Labelled responses, as published: a column says which of two or more responses is better, or that two are tied.

`saferlhf` (PKU-SafeRLHF), `shp` (Stanford Human Preferences), `arena` (Chatbot Arena), `summaries`
(summarize-from-feedback), `helpsteer2` (rows of one response with its score; see joined.py), `swift` (ms-swift: a
conversation with a rejected response).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rm_gallery.data.formats.cells import Cell, as_record, check_text, is_nothing, read_cell, read_list, read_number
from rm_gallery.data.formats.config import FormatConfig
from rm_gallery.data.formats.pairs import MAX_RESPONSES, Draft, prompted, read_response, read_two, read_weight
from rm_gallery.data.formats.rankings import compare
from rm_gallery.errors import BadRow
from rm_gallery.schema import Comparison, Rating


def read_saferlhf(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `saferlhf`: a prompt with two responses."""
    return read_two(values, config, config.columns.response_0, config.columns.response_1)


def compare_saferlhf(values: Mapping[str, Any], config: FormatConfig, count: int) -> list[Comparison]:
    """0: the first response is better, 1: the second."""
    return _best(_index(values, config.columns.better_response_id, 2), 2)


def read_shp(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `shp`: a post with two comments."""
    return read_two(values, config, config.columns.human_ref_A, config.columns.human_ref_B)


def compare_shp(values: Mapping[str, Any], config: FormatConfig, count: int) -> list[Comparison]:
    """1: the first response is better, 0: the second."""
    return _best(1 - _index(values, config.columns.labels, 2), 2)


def read_arena(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `arena`: two conversations, or a prompt with two responses, or lists of the texts of their turns."""
    names = [config.columns.conversation_a or "", config.columns.conversation_b or ""]
    if config.prompt_key is None or (turns := _turn_lists(values, config.prompt_key, *names)) is None:
        return read_two(values, config, *names)
    asked, *answered = turns
    if len(asked) == 1:
        return Draft(asked[0], [text for [text] in answered], names, config.prompt_key)
    chats: list[Cell] = []
    for said in answered:
        pairs = zip(asked, said, strict=True)
        chats.append([{"role": role, "content": t} for pair in pairs for role, t in zip(_ROLES, pair, strict=True)])
    return Draft("", chats, names, config.prompt_key)


_ROLES = ("user", "assistant")


def _turn_lists(values: Mapping[str, Any], *names: str) -> list[list[str]] | None:
    """The texts of the turns in each of these cells, if each is the JSON of a list of texts; None for other cells."""
    found: list[list[str]] = []
    for name in names:
        value = values.get(name)
        if not isinstance(value, str) or not value.lstrip().startswith("["):
            return None
        try:
            texts = json.loads(value)
        except (ValueError, RecursionError):
            return None
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str | None) for text in texts):
            return None
        found.append(texts)
    for name, texts in zip(names, found, strict=True):
        if any(text is None for text in texts):
            raise BadRow(f"{name} with a turn that is null")
        for text in texts:
            check_text(text)
        if not texts[-1].strip():
            raise BadRow(f"empty {name}")
    if len({len(texts) for texts in found}) > 1:
        raise BadRow(f"{', '.join(names)} with different numbers of turns")
    return found


_FIRST, _SECOND = {"a", "model_a", "response_a", "conversation_a"}, {"b", "model_b", "response_b", "conversation_b"}


def compare_arena(values: Mapping[str, Any], config: FormatConfig, count: int) -> list[Comparison]:
    """By the side that the column names, as letter or column, or by the name of the model."""
    name = config.columns.winner or ""
    if name == _OUTCOMES[0]:
        return _one_hot(values, config)
    value = values.get(name)
    if value is None:
        raise BadRow(f"null {name}")
    if not isinstance(value, str):
        raise BadRow(f"{name} that is not text")
    models = [values.get("model_a"), values.get("model_b")]
    if value in models and models[0] != models[1]:
        return _best(models.index(value), 2)
    said = value.strip().lower()
    if said.startswith("tie") or said.replace("_", "").replace(" ", "") in ("bothbad", "bothgood", "both", "draw"):
        return _tie(name, config)
    if said not in _FIRST | _SECOND:
        raise BadRow(f"{name} that names neither side")
    return _best(0 if said in _FIRST else 1, 2)


_OUTCOMES = ("winner_model_a", "winner_model_b", "winner_tie")


def _one_hot(values: Mapping[str, Any], config: FormatConfig) -> list[Comparison]:
    """By three columns of which one is 1; without ties a file may lack the third."""
    names = [name for name in _OUTCOMES if name != _OUTCOMES[2] or name in values]
    cells = [values.get(name) for name in names]
    numbers = [
        float(cell) if isinstance(cell, bool) else read_number(cell, name)
        for cell, name in zip(cells, names, strict=True)
    ]
    if sorted(numbers)[:-1] != [0] * (len(names) - 1) or max(numbers) != 1:
        raise BadRow(f"{', '.join(names)} of which not exactly one is 1 and the others 0")
    best = numbers.index(1)
    return _tie("winner", config) if best == 2 else _best(best, 2)


def _tie(name: str, config: FormatConfig) -> list[Comparison]:
    if config.ties:
        return [Comparison(0, 1, tied=True)]
    raise BadRow(f"{name} that is a tie")


def read_summaries(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `summaries`: summaries of a post or an article."""
    name = config.columns.summaries or ""
    items = read_list(values.get(name), name)
    if not all(isinstance(item, Mapping) for item in items):
        raise BadRow(f"{name} with a summary that is not a record")
    responses = [read_response(item.get("text"), "summary", config) for item in items]
    names = ["summary"] * len(responses)
    info = as_record(values.get(config.columns.info)) if config.columns.info is not None else None
    if info is None:
        return prompted(values, config, responses, names)
    texts = []
    for key in ("title", "post", "article"):
        part = info.get(key)
        if isinstance(part, str) and part.strip():
            cell = read_cell(part, key)
            if not isinstance(cell, str):
                raise BadRow(f"{key} with messages, not text")
            texts.append(cell)
    return Draft("\n\n".join(texts), responses, names, config.columns.info)


def compare_summaries(values: Mapping[str, Any], config: FormatConfig, count: int) -> list[Comparison]:
    """The chosen summary is better than each of the others."""
    if not 2 <= count <= MAX_RESPONSES:
        raise BadRow(f"{config.columns.summaries} with fewer than 2 or more than {MAX_RESPONSES} summaries")
    return _best(_index(values, config.columns.choice, count), count)


def _index(values: Mapping[str, Any], name: str | None, count: int) -> int:
    """The index in a column, from 0."""
    number = read_number(values.get(name or ""), name or "")
    if number not in range(count):
        raise BadRow(f"{name} that is not from 0 to {count - 1}")
    return int(number)


def _best(best: int, count: int) -> list[Comparison]:
    return [Comparison(best, other) for other in range(count) if other != best]


def read_swift(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `swift`: a conversation that ends with the chosen response, and the rejected one."""
    names = [config.columns.messages or "", config.columns.rejected_response or ""]
    chosen, rejected = [read_response(values.get(name), name, config) for name in names]
    if isinstance(chosen, str) or len(chosen) < 2 or chosen[-1]["role"] != "assistant":
        raise BadRow(f"{names[0]} that do not end with an assistant turn after others")
    return Draft(chosen[:-1], [chosen[-1:], rejected], names)


def read_helpsteer2(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `helpsteer2`: the responses of joined rows to one prompt."""
    name = config.columns.response or ""
    responses: list[Cell] = [read_response(cell, name, config) for cell in _joined(values, name)]
    return prompted(values, config, responses, [name] * len(responses))


def compare_helpsteer2(values: Mapping[str, Any], config: FormatConfig, count: int) -> list[Comparison]:
    """By score, higher is better; the difference is the margin."""
    name = config.columns.helpfulness or ""
    if count < 2:
        raise BadRow("one response to a prompt that the next row does not repeat")
    if count > MAX_RESPONSES:
        raise BadRow(f"more than {MAX_RESPONSES} responses")
    scores = [read_number(value, name) for value in _joined(values, name)]
    return compare(scores, f"all {name} of a prompt equal", with_margins=True, ties=config.ties)


def rate_helpsteer2(values: Mapping[str, Any], config: FormatConfig, count: int) -> list[Rating]:
    """Format `helpsteer2`: its helpfulness is the score of a response."""
    name = config.columns.helpfulness or ""
    return [Rating(place, score=read_number(value, name)) for place, value in enumerate(_joined(values, name))]


def read_rated_conversation(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """With `model.attributes`: a conversation that ends with the rated response."""
    name = config.columns.messages or ""
    turns = read_response(values.get(name), name, config)
    if isinstance(turns, str) or turns[-1]["role"] != "assistant":
        raise BadRow(f"{name} that do not end with an assistant turn")
    return Draft(turns[:-1], [turns[-1:]], [name])


def rate_attributes(values: Mapping[str, Any], config: FormatConfig, count: int) -> list[Rating]:
    """With `model.attributes`: a number for each name, from the column of that name, else from `attributes`.

    A response may lack some of them. Raises BadRow if all responses lack all.
    """
    if count > MAX_RESPONSES:
        raise BadRow(f"more than {MAX_RESPONSES} responses")
    columns = {name: _each(values, name, count) for name in config.attributes}
    records = [as_record(value) or {} for value in _each(values, config.attributes_key, count)]
    weights = _each(values, config.weight_key, count)
    ratings = []
    for place, record in enumerate(records):
        found = [columns[name][place] for name in config.attributes]
        cells = [record.get(name) if is_nothing(cell) else cell for name, cell in zip(columns, found, strict=True)]
        numbers = [math.nan if is_nothing(c) else read_number(c, n) for n, c in zip(columns, cells, strict=True)]
        weight = read_weight({config.weight_key or "": weights[place]}, config.weight_key)
        ratings.append(Rating(place, attributes=tuple(numbers), weight=weight))
    if all(math.isnan(value) for each in ratings for value in each.attributes):
        raise BadRow(f"no value of {', '.join(config.attributes)}")
    return ratings


def rate_lists(values: Mapping[str, Any], config: FormatConfig, count: int) -> list[Rating]:
    """The same for a list of responses, with a list of numbers in the column of each name and one weight."""
    lists = {name: read_list(values[name], name) for name in config.attributes if not is_nothing(values.get(name))}
    for name, cells in lists.items():
        if len(cells) != count:
            raise BadRow(f"{name} of a different length than the responses")
    weights = {config.weight_key or "": [values.get(config.weight_key or "")] * count}
    return rate_attributes({**lists, **weights}, config, count)


def _each(values: Mapping[str, Any], name: str | None, count: int) -> Sequence[Any]:
    """The cell of each joined row; None where there is no such column."""
    return _joined(values, name) if name is not None and name in values else [None] * count


def _joined(values: Mapping[str, Any], name: str) -> Sequence[Any]:
    value = values.get(name)
    return value if isinstance(value, list) else [value]
