"""Turns: prompt and responses as conversations, in which each turn stands once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rm_gallery.data.dropped import BadRow
from rm_gallery.data.formats.cells import Cell
from rm_gallery.schema import Message


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
