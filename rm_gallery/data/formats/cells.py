"""Cells: reading and checking the value of a column: text or messages, numbers, lists, tool definitions, names.

A fault raises BadRow with a reason, the same text for all rows with the same fault: it names the column, never the
value.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal, TypeAlias

from rm_gallery.data.sources import Row
from rm_gallery.errors import BadRow
from rm_gallery.schema import Message

Cell: TypeAlias = str | list[Message]
"""Text, or messages."""

ROLES = frozenset({
    "system", "developer", "user", "assistant", "tool", "function", "ipython", "observation", "environment",
    "context", "documents",
})  # fmt: skip
"""Roles that a message may have. Most chat templates print any role as it is, so a misspelt one, or one that contains
control tokens, would go unnoticed."""


_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
    "tool_response": "tool",
}  # fmt: skip
_SHAREGPT_CALLS = ("function_call", "tool_call")


def read_cell(value: Any, name: str, *, required: bool = True) -> Cell:
    """Text or messages of one cell. A JSON string of messages becomes these messages, one message a list of one.

    Messages have `role` and `content`, or `from` and `value` as in ShareGPT; an object with `messages` stands for them.
    Raises BadRow for anything else. An empty cell is '', or a BadRow if `required`.
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
    if isinstance(value, Mapping):
        if _is_message(value):
            return _check_messages([value], name, required)
        if isinstance(value.get("messages"), list):
            return _check_messages(value["messages"], name, required)
    if not isinstance(value, list):
        raise BadRow(f"{name} that is {type(value).__name__}, not text or messages")
    return _check_messages(value, name, required) if value or required else ""


def kind_of(value: Any) -> Literal["text", "messages", "json"] | None:
    """What a cell looks like, unchecked: text, messages or a JSON string of messages; None for neither."""
    if isinstance(value, str):
        try:
            return "text" if _json_messages(value, "") is None else "json"
        except BadRow:
            return "json"
    if isinstance(value, Mapping):
        return "messages" if _is_message(value) or isinstance(value.get("messages"), list) else None
    if isinstance(value, list):
        first = next((item for item in value if item is not None), None)
        return "messages" if first is None or isinstance(first, Mapping) else None
    return None


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or ("from" in value and "value" in value))


_OPENS_LIST = re.compile(r"\s*\[\s*\{")
_OPENS_OBJECT = re.compile(r"\s*\{")
_OPENS_MESSAGES = re.compile(r"\s*\[?\s*\{\s*[\"'](role|content|from|value)[\"']\s*:")


def _json_messages(text: str, name: str) -> list[Any] | None:
    """The messages in a JSON string of a list of them, or of one; None for any other text, other JSON included.

    Raises BadRow for text that begins like such a list but is not JSON: truncated, or written by Python's `str`.
    """
    is_list = bool(_OPENS_LIST.match(text))
    if not is_list and not (_OPENS_OBJECT.match(text) and _OPENS_MESSAGES.match(text)):
        return None
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        if is_list and _OPENS_MESSAGES.match(text):
            raise BadRow(f"{name} with a list of messages that is not valid JSON") from None
        return None
    items = parsed if is_list and isinstance(parsed, list) else [parsed]
    is_messages = any(_is_message(item) and not item.keys().isdisjoint(_SAID) for item in items)
    return items if is_messages and (is_list or _role_of(parsed) in ROLES) else None


_SAID = ("content", "tool_calls", "value")


def _role_of(message: Mapping[str, Any]) -> Any:
    """The role of a message, that of ShareGPT in the words of chat templates; None for none."""
    role = message.get("role")
    if role is not None or not isinstance(message.get("from"), str):
        return role
    said = message["from"]
    return "assistant" if said in _SHAREGPT_CALLS else _SHAREGPT_ROLES.get(said, said)


def _from_sharegpt(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A turn with `from` and `value` as a turn with role and content; `function_call` holds a call, or several."""
    turn = {key: value for key, value in message.items() if key not in ("from", "value", "role", "content")}
    role, said = _role_of(message), message.get("value")
    if message["from"] not in _SHAREGPT_CALLS:
        return {"role": role, "content": said, **turn}
    calls = _parsed(said, name) if isinstance(said, str) else said
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, Mapping) and {"name", "arguments"} <= call.keys() for call in calls):
        raise BadRow(f"{name} with a function call without name and arguments")
    functions = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
    return {"role": role, "content": "", "tool_calls": [{"type": "function", "function": f} for f in functions], **turn}


def _check_messages(messages: Sequence[Any], name: str, required: bool) -> list[Message]:
    if required and not messages:
        raise BadRow(f"empty {name}")
    return [_check_message(message, name) for message in messages]


def _check_message(message: Any, name: str) -> Message:
    """The message without null fields; content as one text, or the null that a message with tool calls may have."""
    role = _role_of(message) if isinstance(message, Mapping) else None
    if not isinstance(role, str):
        raise BadRow(f"{name} with a message that has no role")
    if role not in ROLES:
        raise BadRow(f"{name} with an unknown role")
    if message.get("role") is None:
        message = _from_sharegpt(message, name)
    checked = {key: value for key, value in message.items() if value is not None or key == "content"}
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
        raise BadRow(f"{name} with tool calls that are not a list of calls")
    return plain_json(value, f"tool call in {name}")


def _joined(parts: Sequence[Any], name: str) -> str:
    """Text parts, as in the chat API, as one text: most chat templates would print the list as it is."""
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise BadRow(f"{name} with a message that has no text content")
    return check_text("".join(map(str, texts)))


LONE_SURROGATE = "text with a lone surrogate"
_LARGEST = 1e38  # the loss is computed in float32, which must hold the difference of two such numbers
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
_LONGEST_NUMBER = 64  # characters
_LONGEST_INTEGER = 1024  # bits; beyond 4,300 digits Python refuses to print one


def check_text(text: str) -> str:
    """The text itself; raises BadRow for a lone surrogate, which JSON can spell and no tokenizer accepts."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRow(LONE_SURROGATE) from None
    return text


def is_number(value: Any) -> bool:
    """Whether this is a number, or the text of one as in CSV; true and false are not."""
    if isinstance(value, str):
        text = value.strip()
        return len(text) <= _LONGEST_NUMBER and bool(_NUMBER.fullmatch(text) or _NOT_FINITE.fullmatch(text))
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def read_number(value: Any, name: str) -> float:
    """A finite number; raises BadRow for anything else, including NaN, infinities and what float32 cannot hold."""
    if isinstance(value, bool):
        raise BadRow(f"{name} that is true or false, not a number")
    if not is_number(value):
        raise BadRow(f"null {name}" if value is None else f"{name} that is not a number")
    try:
        number = float(value)
    except (OverflowError, ValueError):  # a whole number of 400 digits; a signalling NaN of a decimal column
        raise BadRow(f"{name} that is not finite") from None
    if not math.isfinite(number):
        raise BadRow(f"{name} that is not finite")
    if abs(number) > _LARGEST:
        raise BadRow(f"{name} that is too large for 32 bits")
    return number


def is_nothing(value: Any) -> bool:
    """Whether a cell is empty: null, or blank text as in CSV."""
    return value is None or (isinstance(value, str) and not value.strip())


def optional_number(values: Mapping[str, Any], name: str | None) -> float | None:
    """The number in a column, or None if the row has none."""
    value = values.get(name) if name is not None else None
    return None if is_nothing(value) else read_number(value, name or "")


def read_list(value: Any, name: str) -> Sequence[Any]:
    """The list in a cell, or in the JSON text of a cell."""
    if value is None:
        raise BadRow(f"null {name}")
    if isinstance(value, str):
        value = _parsed(value, name)
    if not isinstance(value, list):
        raise BadRow(f"{name} that is not a list")
    return value


def as_record(value: Any) -> Mapping[str, Any] | None:
    """The object in a cell, or in the JSON text of a cell; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, Mapping) else None


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRow(f"{name} that is not valid JSON") from None


def read_name(values: Mapping[str, Any], name: str | None) -> str:
    """The text in a column of names, or '' if the row has none; a number is a name too, NaN is not."""
    value = values.get(name) if name is not None else None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return check_text(value)
    if isinstance(value, int | float) and abs(value) < _LARGEST:
        return str(value)
    raise BadRow(f"{name} that is not text")


def read_tools(values: Mapping[str, Any], name: str | None) -> list[Any]:
    """Tool definitions in a column, as plain JSON values; [] without the column, for null, and for empty text."""
    value = values.get(name) if name is not None else None
    if is_nothing(value) or (isinstance(value, str) and value.strip() == "null"):
        return []
    assert name is not None
    tools = read_list(value, name)
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow(f"{name} with a tool that is not a JSON object")
    plain = plain_json(tools, name)
    assert isinstance(plain, list)
    return plain


def plain_json(value: Any, name: str) -> Any:
    """A copy made of plain JSON values, nulls included.

    Raises BadRow for values that JSON does not have (bytes, dates, NaN) and for lone surrogates.
    """
    if isinstance(value, str):
        return check_text(value)
    if isinstance(value, Mapping):
        return {check_text(str(key)): plain_json(item, name) for key, item in value.items()}
    if isinstance(value, list):
        return [plain_json(item, name) for item in value]
    if value is None or isinstance(value, bool) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, int) and value.bit_length() <= _LONGEST_INTEGER:
        return value
    raise BadRow(f"{name} with a value that is not JSON")


def own_values(row: Row, tools: str | None) -> dict[str, Any]:
    """The columns of a row, without nulls that its file added inside the tools column and the tool calls of messages.

    Arrow gives each struct the fields of all rows: `{"city": "Oslo", "date": null}` stands for a call without a date.
    """
    if not row.has_added_nulls:
        return row.values
    return {
        name: _without_nulls(value) if name == tools else _with_own_calls(value) for name, value in row.values.items()
    }


def _with_own_calls(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_own_calls(item) for item in value] if any(isinstance(v, list | dict) for v in value) else value
    if not isinstance(value, dict):
        return value
    return {key: _without_nulls(item) if key == "tool_calls" else _with_own_calls(item) for key, item in value.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
