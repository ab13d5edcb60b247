"""Formats: one row of a file becomes a `PreferenceGroup`, or a counted reason why it cannot.

Read here: `chosen` / `rejected` as strings, as lists of messages, or as JSON strings of such lists, with an optional
prompt column (string or messages).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rm_gallery.data.dropped import BadRow, Dropped
from rm_gallery.data.source import Row
from rm_gallery.errors import UserError, nearest
from rm_gallery.schema import Comparison, InputStyle, Message, PreferenceGroup


@dataclass(frozen=True)
class CustomClassConfig:
    """`data.custom_cls`: a data set class of the user's own."""

    __pydantic_config__ = {"extra": "forbid"}

    path: str | None = None
    """Python file that defines the class."""
    name: str | None = None
    """Name of the class in that file."""


@dataclass(frozen=True)
class FormatConfig:
    """Part of `data`: how a row is read."""

    __pydantic_config__ = {"extra": "forbid"}

    prompt_key: str | None = "prompt"
    """Column of the prompt; a file without it has the prompt inside its responses. null reads no prompt column."""
    chosen_key: str = "chosen"
    """Column of the preferred response."""
    rejected_key: str = "rejected"
    """Column of the other response."""
    input_style: Literal["auto", "text", "chat"] = "auto"
    """`chat` renders messages with the chat template, `text` takes strings as they are. `auto`: chat for messages and
    for a string prompt with string responses when the tokenizer has a chat template; text otherwise."""
    bad_rows: Literal["drop", "error"] = "drop"
    """What a row that cannot be used does: `drop` leaves it out and counts it, `error` stops there."""
    custom_cls: CustomClassConfig = field(default_factory=CustomClassConfig)


def read_groups(
    rows: Iterable[Row], config: FormatConfig, *, has_chat_template: bool, dropped: Dropped
) -> Iterator[PreferenceGroup]:
    """Groups of the usable rows, in order; the others are added to `dropped`.

    Raises UserError for a file that lacks the columns or holds something else in them than text or messages, and at
    the first bad row under `bad_rows=error`.
    """
    checked: str | None = None
    for row in rows:
        if row.file != checked and not row.fault:
            _check_columns(row, row.file, config)
            checked = row.file
        try:
            if row.fault:
                raise BadRow(row.fault)
            yield _read_pair(row, config, has_chat_template)
        except BadRow as error:
            if config.bad_rows == "error":
                raise UserError(
                    f"{row.where}: {error}; mend the row, or set data.bad_rows=drop to leave it out"
                ) from None
            dropped.add(str(error), row.where)


def _check_columns(row: Row, file: str, config: FormatConfig) -> None:
    wanted = {"chosen_key": config.chosen_key, "rejected_key": config.rejected_key}
    if config.prompt_key and config.prompt_key != "prompt":
        wanted["prompt_key"] = config.prompt_key
    for option, name in wanted.items():
        if name not in row.values:
            columns = ", ".join(row.values) or "none"
            raise UserError(
                f"{file}: no column {name!r} (columns: {columns}); rename it or set data.{option}."
                + nearest(name, row.values)
            )


def _check_type(row: Row, name: str, option: str) -> None:
    """Raise UserError for what is neither text nor messages: a column has one type, so every row would have it."""
    value = row.values.get(name)
    held = type(value).__name__
    if isinstance(value, list):
        items = [item for item in value if item is not None]
        if not items or isinstance(items[0], Mapping):
            return
        held = f"lists of {type(items[0]).__name__}"
    if value is not None and not isinstance(value, str):
        raise UserError(
            f"{row.where}: column {name!r} holds {held}, not text or messages; "
            f"write it as strings or name another column with data.{option}"
        )


def _read_pair(row: Row, config: FormatConfig, has_chat_template: bool) -> PreferenceGroup:
    prompt_key = config.prompt_key or ""
    for name, option in (
        (config.chosen_key, "chosen_key"), (config.rejected_key, "rejected_key"), (prompt_key, "prompt_key")
    ):  # fmt: skip
        _check_type(row, name, option)
    prompt = read_cell(row.values.get(prompt_key), prompt_key, required=False)
    chosen = read_cell(row.values[config.chosen_key], config.chosen_key)
    rejected = read_cell(row.values[config.rejected_key], config.rejected_key)
    if chosen == rejected:
        raise BadRow("chosen equal to rejected")
    style = _style(prompt, chosen, rejected, config.input_style, has_chat_template)
    if style == "chat":
        before = as_messages(prompt, "user")
        answers = [as_messages(value, "assistant") for value in (chosen, rejected)]
        for name, answer in zip((config.chosen_key, config.rejected_key), answers, strict=True):
            _check_answer(answer[-1], name)
        turns, answers = without_repeats(before, answers)
        return PreferenceGroup(turns, answers, (Comparison(0, 1),), "chat", row.where)
    if not all(isinstance(part, str) for part in (prompt, chosen, rejected)):
        raise BadRow("messages under data.input_style=text")
    return PreferenceGroup(prompt, [chosen, rejected], (Comparison(0, 1),), "text", row.where)


def read_cell(value: Any, name: str, *, required: bool = True) -> str | list[Message]:
    """Text or messages of one cell; a JSON string of a message list becomes that list."""
    if value is None:
        if required:
            raise BadRow(f"null {name}")
        return ""
    if isinstance(value, list):
        return _check_messages(value, name, required) if value or required else ""
    if required and not value.strip():
        raise BadRow(f"empty {name}")
    messages = _json_messages(value, name)
    return value if messages is None else _check_messages(messages, name, required)


_OPENS_LIST = re.compile(r"\s*\[\s*\{")
_OPENS_MESSAGES = re.compile(r"\s*\[\s*\{\s*[\"'](role|content)[\"']\s*:")


def _json_messages(text: str, name: str) -> list[Any] | None:
    """The list in a JSON string of messages, or None for any other text, other JSON included.

    Raises BadRow for text that begins as such a list but is not JSON: cut off, or written by Python's `str`.
    """
    if not _OPENS_LIST.match(text):
        return None
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        if _OPENS_MESSAGES.match(text):
            raise BadRow(f"{name} with a list of messages that is not valid JSON") from None
        return None
    is_messages = isinstance(parsed, list) and any(
        isinstance(item, dict) and "role" in item and ("content" in item or "tool_calls" in item) for item in parsed
    )
    return parsed if is_messages else None


def _check_messages(messages: Sequence[Any], name: str, required: bool) -> list[Message]:
    if required and not messages:
        raise BadRow(f"empty {name}")
    checked = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadRow(f"{name} with a message that has no role")
        content = message.get("content")
        if not isinstance(content, str) and (content is not None or not message.get("tool_calls")):
            raise BadRow(f"{name} with a message that has no text content")
        # Parquet gives every struct field that any row has; a null field means that the message does not have it.
        checked.append({key: value for key, value in message.items() if value is not None})
    return checked


def _style(
    prompt: str | list[Message], chosen: str | list[Message], rejected: str | list[Message], wanted: str, template: bool
) -> InputStyle:
    if wanted == "text":
        return "text"
    if wanted == "chat" or not all(isinstance(part, str) for part in (prompt, chosen, rejected)):
        return "chat"
    return "chat" if prompt and template else "text"


def _check_answer(last: Message, name: str) -> None:
    if last["role"] != "assistant":
        raise BadRow(f"{name} that does not end with an assistant turn")
    if not last.get("content", "").strip() and not last.get("tool_calls"):
        raise BadRow(f"empty {name}")


def without_repeats(
    prompt: list[Message], responses: Sequence[list[Message]]
) -> tuple[list[Message], list[list[Message]]]:
    """Prompt and responses of a chat group, without the turns of the prompt that responses begin with."""
    own = [_not_repeated(prompt, response) for response in responses]
    if all(turns == own[0] for turns in own):
        return own[0] if own else prompt, list(responses)
    return [], [turns + response for turns, response in zip(own, responses, strict=True)]


def _not_repeated(prompt: list[Message], response: list[Message]) -> list[Message]:
    """The turns of the prompt that the response does not begin with.

    Many data sets give whole conversations as responses, and their first turns or the last question as the prompt.
    """
    turns = [(message["role"], message.get("content")) for message in prompt]
    repeated = [(message["role"], message.get("content")) for message in response]
    for size in range(min(len(turns), len(repeated) - 1), 0, -1):
        if turns[-size:] == repeated[:size]:
            return prompt[:-size]
    has_system_turn = repeated[0][0] == "system"
    if has_system_turn and turns and turns == repeated[1 : len(turns) + 1]:
        return []
    return prompt


def as_messages(value: str | list[Message], role: str) -> list[Message]:
    """Messages as they are; text as one message of this role, or none when it is empty."""
    if isinstance(value, str):
        return [{"role": role, "content": value}] if value else []
    return value


def check_custom_class(config: CustomClassConfig) -> None:
    """Say in words that custom classes are not available yet; a path that does not exist is named first."""
    if config.path is None and config.name is None:
        return
    if config.path is None or config.name is None:
        raise UserError("data.custom_cls needs both path (a Python file) and name (the class in it)")
    if not Path(config.path).is_file():
        raise UserError(f"data.custom_cls.path={config.path}: no such file (working directory {Path.cwd()})")
    raise UserError(
        "data.custom_cls is not supported yet: write the pairs to a parquet file with columns chosen and rejected, "
        "and leave data.custom_cls out"
    )
