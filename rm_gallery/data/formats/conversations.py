"""Conversations: prompt and responses as turns that stand once each, and what makes two groups "the same prompt".

The hold-out split goes by the prompt, and so does the search for prompts that stand on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rm_gallery.data.formats.cells import Cell
from rm_gallery.errors import BadRow
from rm_gallery.schema import Message, PreferenceGroup


def as_messages(value: Cell, role: str) -> list[Message]:
    """Messages as they are; text as one message of this role, or none when it is empty."""
    if isinstance(value, str):
        return [{"role": role, "content": value}] if value else []
    return value


def check_answer(last: Message, name: str) -> None:
    """Raise BadRow unless this is an assistant turn that says or calls something."""
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
    if not prompt or len(response) < 2:
        return prompt
    turns, repeated = [_said(message) for message in prompt], [_said(message) for message in response]
    for size in range(min(len(turns), len(repeated) - 1), 0, -1):
        if turns[-size:] == repeated[:size]:
            return prompt[:-size]
    has_system_turn = repeated[0][0] == "system"
    if has_system_turn and turns == repeated[1 : len(turns) + 1]:
        return []
    return prompt


def _said(message: Message) -> tuple[Any, ...]:
    """What makes two turns the same: who says or calls what."""
    return message["role"], message.get("content"), message.get("tool_calls")


def prompt_key(group: PreferenceGroup) -> str:
    """A text that is equal for groups with the same prompt, in every run and on every machine.

    Chats: the prompt and the turns that all responses begin with, but for the last turn of each; who speaks counts,
    white space around what is said does not. Bare texts: the prompt; without one, the beginning that all responses
    share, up to its last line break; without that, the response that comes first in sorted order, so that a pair and
    its flipped copy have the same key.
    """
    if group.style == "chat":
        shared = shared_turns([response for response in group.responses if not isinstance(response, str)])
        prompt = [] if isinstance(group.prompt, str) else group.prompt
        return json.dumps([_turn(message) for message in (*prompt, *shared)], sort_keys=True, default=str)
    texts = [response.strip() for response in group.responses if isinstance(response, str)]
    prompt_text = group.prompt.strip() if isinstance(group.prompt, str) else ""
    if prompt_text or not texts:
        return prompt_text
    return _shared_beginning(texts) or min(texts)


def shared_turns(responses: Sequence[Sequence[Message]]) -> Sequence[Message]:
    """The turns that all responses begin with, the last one of each left out."""
    if not responses:
        return []
    first, *others = responses
    size = min(len(response) for response in responses) - 1
    for other in others:
        size = next((i for i in range(size) if _turn(first[i]) != _turn(other[i])), size)
    return first[: max(size, 0)]


def _turn(message: Message) -> list[object]:
    """Who says or calls what."""
    content = message.get("content")
    said = content.strip() if isinstance(content, str) else content
    calls = message.get("tool_calls")
    return [message.get("role"), said, calls] if calls else [message.get("role"), said]


def _shared_beginning(texts: Sequence[str]) -> str:
    """What K > 1 texts have in common from the start, up to the last line break in it; '' without one."""
    if len(texts) < 2:
        return ""
    first, last = min(texts), max(texts)  # what these two share, all that lie between them share too
    size, most = 0, min(len(first), len(last))
    while size < most:  # bisection, since most of the million characters of two long texts may be shared
        middle = (size + most + 1) // 2
        size, most = (middle, most) if first[:middle] == last[:middle] else (size, middle - 1)
    return first[: first.rfind("\n", 0, size) + 1].strip()
