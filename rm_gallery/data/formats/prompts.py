"""The prompt of a row: its column, the input that follows an instruction, and the turns before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from rm_gallery.data.formats.cells import Cell, check_text, kind_of, read_cell, read_list
from rm_gallery.data.formats.config import FormatConfig
from rm_gallery.data.formats.conversations import as_messages
from rm_gallery.data.formats.names import prompt_names, with_found_names
from rm_gallery.data.sources import Row
from rm_gallery.errors import BadRow
from rm_gallery.schema import Message

_Config = TypeVar("_Config", bound=FormatConfig)


def read_column(values: Mapping[str, Any], name: str | None) -> Cell:
    """Text or messages of this column; '' where the row has none."""
    return "" if name is None else read_cell(values.get(name), name, required=False)


def read_prompt(
    values: Mapping[str, Any], config: FormatConfig, responses: Sequence[Cell] = (), *, first: str | None = None
) -> tuple[Cell, str | None]:
    """The prompt of a row and the name of its column: '' and the usual name for none.

    responses: with a conversation among them that has a user turn, only the usual column is read, since the
    conversation has its own prompt. first: the usual column in place of `data.prompt_key`.
    Raises BadRow for a prompt that ends with the answer to another response than these.
    """
    usual = first or config.prompt_key
    name = find_prompt(values, config, first)
    if name is None or (name != usual and any(map(_has_question, responses))):
        return "", usual
    prompt = read_column(values, name)
    if isinstance(prompt, list) and name != usual and prompt and prompt[-1]["role"] == "assistant":
        if prompt[-1].get("content") not in [_last_content(response) for response in responses]:
            raise BadRow(f"{name} that end with an assistant turn, before the response")
        prompt = prompt[:-1]
    added = config.columns.input
    if isinstance(prompt, str) and name == config.columns.instruction and added is not None:
        more = read_column(values, added)
        if not isinstance(more, str):
            raise BadRow(f"{added} with messages, after the text of {name}")
        prompt = f"{prompt}\n{more}" if more.strip() else prompt
    return prompt, name


def find_prompt(values: Mapping[str, Any], config: FormatConfig, first: str | None = None) -> str | None:
    """The column that holds the prompt of a row: the first of `prompt_names` that is not empty; None for none."""
    usual = (config.prompt_key, first)
    for name in (first, *prompt_names(config)):
        value = values.get(name) if name is not None else None
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            continue
        if name in usual or (kind_of(value) is not None and not (name == config.history_key and is_turns(value))):
            return name
    return None


def _has_question(response: Cell) -> bool:
    return not isinstance(response, str) and any(turn["role"] == "user" for turn in response)


def _last_content(response: Cell) -> Any:
    if isinstance(response, str):
        return response
    return response[-1].get("content") if response else None


def is_turns(value: Any) -> bool:
    """Whether this is a list, or text that begins like the JSON of one."""
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


def read_before(values: Mapping[str, Any], config: FormatConfig, prompt_name: str | None) -> list[Message]:
    """The turns before the prompt: a system turn, and earlier turns; [] for a row without them.

    prompt_name: column that was read as the prompt.
    """
    found = []
    if config.system_key is not None and config.system_key != prompt_name:
        said = read_column(values, config.system_key)
        turns = as_messages(said, "system") if not isinstance(said, str) or said.strip() else []
        if any(turn["role"] not in ("system", "developer") for turn in turns):
            raise BadRow(f"{config.system_key} with a turn of another role")
        found += turns
    if config.history_key is not None and config.history_key != prompt_name:
        found += _read_history(values.get(config.history_key), config.history_key)
    return found


def _read_history(value: Any, name: str) -> list[Message]:
    """Earlier turns: messages, or pairs of what the user and the assistant said, as LLaMA-Factory writes them."""
    if value is None or (isinstance(value, str) and value.strip() in ("", "null")):
        return []
    turns = read_list(value, name)
    if all(isinstance(turn, Mapping) for turn in turns):
        cell = read_cell(turns, name, required=False)
        return cell if isinstance(cell, list) else []
    found: list[Message] = []
    for turn in turns:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(said, str) for said in turn)):
            raise BadRow(f"{name} that has neither messages nor pairs of texts")
        asked, answered = map(check_text, turn)
        found += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return found


def with_names_of(rows: Sequence[Row], config: _Config) -> _Config:
    """The configuration with the names of the columns of these rows that are read, the prompt of most included."""
    named = with_found_names(config, dict.fromkeys(name for row in rows for name in row.values))
    prompts = Counter(name for row in rows if (name := find_prompt(row.values, config)) is not None)
    return replace(named, prompt_key=prompts.most_common(1)[0][0]) if prompts else named
