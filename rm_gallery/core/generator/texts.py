"""Texts of a case: prompts and responses as text or messages, and a key that is the same for the same content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from rm_gallery.data.formats import as_messages, read_cell, without_repeats
from rm_gallery.errors import BadRow
from rm_gallery.schema import Message

Text: TypeAlias = str | list[Message]


def is_nothing(value: Any) -> bool:
    """None, and what tables have in empty cells."""
    is_nan = isinstance(value, float) and value != value
    return value is None or is_nan or type(value).__name__ in ("NAType", "NaTType")


def read_text(value: Any, name: str) -> Text:
    """Text or messages; a JSON string of messages becomes these, as the trainer reads it.

    Raises BadRow for anything else, and for what is empty.
    """
    if is_nothing(value):
        raise BadRow(f"null {name}")
    if not isinstance(value, str):
        value = to_lists(value)
        if isinstance(value, dict) and "role" in value:
            value = [value]
        if not isinstance(value, list):
            raise BadRow(f"a {name} that is {type(value).__name__}, not text or messages")
    return read_cell(value, name)


def read_answer(value: Any) -> Text:
    """A response. Raises BadRow as `read_text`, and for messages that do not end with an answer."""
    text = read_text(value, "response")
    if isinstance(text, list):
        last = text[-1]
        if last["role"] != "assistant":
            raise BadRow("a response that does not end with an assistant turn")
        if not (last.get("content") or "").strip() and not last.get("tool_calls"):
            raise BadRow("empty response")
    return text


def split_turns(prompt: Text, responses: Sequence[Text]) -> tuple[Text, list[Text]]:
    """Prompt and responses, where the turns that all responses begin with belong to the prompt, once.

    The last turn of a response is always its own. Texts stay as they are.
    """
    if all(isinstance(response, str) for response in responses):
        return prompt, list(responses)
    turns, answers = without_repeats(
        as_messages(prompt, "user"), [as_messages(text, "assistant") for text in responses]
    )
    shared = 0
    while all(len(answer) > shared + 1 for answer in answers):
        if len({content_key(answer[shared : shared + 1], "") for answer in answers}) > 1:
            break
        shared += 1
    if not shared and turns == as_messages(prompt, "user"):
        return prompt, list(responses)
    return [*turns, *answers[0][:shared]], [answer[shared:] for answer in answers]


def shared_beginning(texts: Sequence[str]) -> str:
    """What two or more texts have in common from the start, up to its last line break; '' without one.

    Where a prompt is not given by itself, this is it, as far as anybody can tell.
    """
    first, last = min(texts), max(texts)  # what these share, those between them share too
    size, most = 0, len(first)
    while size < most:  # halving what is left, as texts may be long
        middle = (size + most + 1) // 2
        if last.startswith(first[size:middle], size):
            size = middle
        else:
            most = middle - 1
    return first[: first.rfind("\n", 0, size) + 1].strip()


def to_lists(value: Any, depth: int = 0) -> Any:
    """Lists and dictionaries for tuples, arrays and message objects. Raises BadRow for what is nested without end."""
    if depth > 100:
        raise BadRow("messages nested more than 100 deep")
    for method in ("model_dump", "tolist"):
        if callable(getattr(value, method, None)) and not isinstance(value, type):
            value = getattr(value, method)()
    if isinstance(value, Mapping):
        return {key: to_lists(item, depth + 1) for key, item in value.items()}
    return [to_lists(item, depth + 1) for item in value] if isinstance(value, list | tuple) else value


def content_key(value: Text, role: str) -> bytes:
    """16 bytes that stand for a text or messages; a text is one message of this role.

    White space around a content does not count. Raises BadRow for what cannot be written to a file.
    """
    digest = hashlib.blake2b(digest_size=16)
    for message in as_messages(value, role):
        if not all(isinstance(name, str) for name in message):
            raise BadRow("a message with a field whose name is no text")
        for name, content in sorted(message.items()):
            part = to_utf8(content.strip() if isinstance(content, str) else _as_json(content))
            digest.update(b"%b %d " % (to_utf8(name), len(part)))
            digest.update(part)
        digest.update(b"\n")
    return digest.digest()


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise BadRow("messages that JSON cannot hold") from None


def to_utf8(text: str) -> bytes:
    """Raises BadRow for half a surrogate pair, which has no such form."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise BadRow("text that is not valid Unicode (half of a surrogate pair)") from None
