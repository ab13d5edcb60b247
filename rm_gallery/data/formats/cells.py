"""Cells: text or messages in one column, and which of the two they are."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from rm_gallery.data.dropped import BadRow
from rm_gallery.data.formats.values import check_text, plain_json
from rm_gallery.schema import Message

Cell: TypeAlias = str | list[Message]
"""Text, or messages."""

ROLES = frozenset({
    "system", "developer", "user", "assistant", "tool", "function", "ipython", "observation", "environment",
    "context", "documents",
})  # fmt: skip
"""Roles that a message may have. Most chat templates write any word where the role belongs, so a misspelt one, or one
with control tokens in it, would pass in silence."""


def read_cell(value: Any, name: str, *, required: bool = True) -> Cell:
    """Text or messages of one cell; a JSON string of a message list becomes that list, one message a list of one.

    Raises BadRow for a cell that is neither, and for an empty one unless it is not `required` (then it gives '').
    """
    if isinstance(value, str):
        if required and not value.strip():
            raise BadRow(f"empty {name}")
        messages = _json_messages(value, name)
        return check_text(value) if messages is None else _check_messages(messages, name, required)
    if value is None:
        if required:
            raise BadRow(f"null {name}")
        return ""
    if isinstance(value, Mapping) and "role" in value:
        return _check_messages([value], name, required)
    if not isinstance(value, list):
        raise BadRow(f"{name} that is {type(value).__name__}, not text or messages")
    return _check_messages(value, name, required) if value or required else ""


def kind_of(value: Any) -> Literal["text", "messages", "json"] | None:
    """What a cell is meant as, without checking it: text, messages or a JSON string of them; None for neither."""
    if isinstance(value, str):
        try:
            return "text" if _json_messages(value, "") is None else "json"
        except BadRow:
            return "json"
    if isinstance(value, Mapping):
        return "messages" if "role" in value else None
    if isinstance(value, list):
        first = next((item for item in value if item is not None), None)
        return "messages" if first is None or isinstance(first, Mapping) else None
    return None


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
    return [_check_message(message, name) for message in messages]


def _check_message(message: Any, name: str) -> Message:
    """The message without its null fields, which parquet gives it when other rows have them; content as one text."""
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str):
        raise BadRow(f"{name} with a message that has no role")
    if role not in ROLES:
        raise BadRow(f"{name} with an unknown role")
    checked = {key: value for key, value in message.items() if value is not None}
    if "tool_calls" in checked:
        checked["tool_calls"] = _tool_calls(checked["tool_calls"], name)
    content = checked.get("content")
    if isinstance(content, str):
        check_text(content)
    elif isinstance(content, list):
        checked["content"] = _joined(content, name)
    elif content is not None or not checked.get("tool_calls"):
        raise BadRow(f"{name} with a message that has no text content")
    return checked


def _tool_calls(value: Any, name: str) -> Any:
    if not isinstance(value, list) or not all(isinstance(call, Mapping) for call in value):
        raise BadRow(f"{name} with tool calls that are no list of calls")
    return plain_json(value, f"tool call in {name}")


def _joined(parts: Sequence[Any], name: str) -> str:
    """Parts of text, as in the chat API, as one text: most chat templates would print the list as it is."""
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise BadRow(f"{name} with a message that has no text content")
    return check_text("".join(map(str, texts)))
