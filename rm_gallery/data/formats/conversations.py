"""Conversations: prompt and responses without repeated turns, the identity of a prompt, and the hold-out by prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Literal, TypeAlias

from rm_gallery.data.formats.cells import Cell
from rm_gallery.errors import BadRow
from rm_gallery.schema import Message, PreferenceGroup


def as_messages(value: Cell, role: str) -> list[Message]:
    """Messages as they are; text as one message of this role, or none when it is empty."""
    if isinstance(value, str):
        return [{"role": role, "content": value}] if value else []
    return value


def check_answer(turns: Sequence[Message], name: str) -> None:
    """Raise BadRow unless these end with an assistant turn that has content or calls a tool."""
    last = turns[-1]
    if last["role"] != "assistant":
        raise BadRow(f"{name} that does not end with an assistant turn")
    if not (last.get("content") or "").strip() and not last.get("tool_calls"):
        raise BadRow(f"empty {name}")


def without_repeats(
    prompt: list[Message], responses: Sequence[list[Message]]
) -> tuple[list[Message], list[list[Message]]]:
    """Prompt and responses of a chat group, without the turns of the prompt that responses repeat at their start.

    Prompt [u1] with responses [u1 a1] and [u1 a2] gives the prompt [] and the responses as they are. If the responses
    repeat different parts of the prompt, each response gets its missing turns and the prompt is empty.
    """
    own = [_not_repeated(prompt, response) for response in responses]
    if all(turns == own[0] for turns in own):
        return own[0] if own else prompt, list(responses)
    return [], [turns + response for turns, response in zip(own, responses, strict=True)]


def _not_repeated(prompt: list[Message], response: list[Message]) -> list[Message]:
    """The turns of the prompt that the response does not begin with.

    In many datasets responses are whole conversations, and the prompt is their first turns or the last question.
    """
    if not prompt or len(response) < 2:
        return prompt
    turns, repeated = (
        [(message["role"], message.get("content"), message.get("tool_calls")) for message in part]
        for part in (prompt, response)
    )
    for size in range(min(len(turns), len(repeated) - 1), 0, -1):
        if turns[-size:] == repeated[:size]:
            return prompt[:-size]
    has_system_turn = repeated[0][0] == "system"
    if has_system_turn and turns == repeated[1 : len(turns) + 1]:
        return []
    return prompt


HoldOut: TypeAlias = tuple[Literal["train", "val"], float]
"""The wanted side of the hold-out, and the fraction of the prompts that is held out for validation."""


def is_wanted(prompt_hash: int, hold_out: HoldOut) -> bool:
    """Whether a prompt belongs to this side: the same prompts are held out whatever the order and size of the data.

    With ("val", 0.1), the prompts whose hash is below 0.1 * 2**64.
    """
    side, fraction = hold_out
    return (prompt_hash / 2**64 < fraction) == (side == "val")


def hash_prompt(key: str) -> int:
    """A 64-bit hash of a `prompt_key`; the same on every machine."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def prompt_key(group: PreferenceGroup) -> str:
    """A text that is equal for groups with the same prompt, in every run and on every machine.

    Chats: the prompt and the turns that all responses share, except the last turn of each; roles count, white space
    around contents does not. Raw texts: the prompt; without one, the common prefix of the responses up to its last
    line break; without that, the first response in sorted order, so that a pair and its flipped copy have the same key.
    A conversation whose prompt ends before its first answer: that prompt.
    """
    if group.style == "chat":
        if len(group.responses) == 1 and group.prompt and _begins_with_answer(group.responses[0]):
            return json.dumps([_turn(message) for message in group.prompt], sort_keys=True, default=str)  # type: ignore[arg-type]
        shared = shared_turns([response for response in group.responses if not isinstance(response, str)])
        prompt = [] if isinstance(group.prompt, str) else group.prompt
        return json.dumps([_turn(message) for message in (*prompt, *shared)], sort_keys=True, default=str)
    texts = [response.strip() for response in group.responses if isinstance(response, str)]
    prompt_text = group.prompt.strip() if isinstance(group.prompt, str) else ""
    if prompt_text or not texts:
        return prompt_text
    return _shared_beginning(texts) or min(texts)


def _begins_with_answer(response: str | Sequence[Message]) -> bool:
    """Whether these are several turns of which the first is an answer."""
    return not isinstance(response, str) and len(response) > 1 and response[0].get("role") == "assistant"


def shared_turns(responses: Sequence[Sequence[Message]]) -> Sequence[Message]:
    """The turns that all responses begin with, without the last turn of each."""
    if not responses:
        return []
    first, *others = responses
    size = min(len(response) for response in responses) - 1
    for other in others:
        size = next((i for i in range(size) if _turn(first[i]) != _turn(other[i])), size)
    return first[: max(size, 0)]


def _turn(message: Message) -> list[object]:
    """Role, content and tool calls."""
    content = message.get("content")
    text = content.strip() if isinstance(content, str) else content
    calls = message.get("tool_calls")
    return [message.get("role"), text, calls] if calls else [message.get("role"), text]


def _shared_beginning(texts: Sequence[str]) -> str:
    """The common prefix of K > 1 texts, up to its last line break; '' without one."""
    if len(texts) < 2:
        return ""
    first, last = min(texts), max(texts)  # in sorted order: what these two share, all share
    size, most = 0, min(len(first), len(last))
    while size < most:  # bisection: two long texts may share a million characters
        middle = (size + most + 1) // 2
        size, most = (middle, most) if first[:middle] == last[:middle] else (size, middle - 1)
    return first[: first.rfind("\n", 0, size) + 1].strip()
