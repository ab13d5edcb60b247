"""ChatMessage: one turn of a conversation, in the shape of the OpenAI API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict

from rm_gallery.errors import UserError
from rm_gallery.schema import Message


class ChatMessage(BaseModel):
    """One turn; further keys (tool calls, names) are kept and sent on."""

    model_config = ConfigDict(extra="allow")

    role: str = "user"
    content: str | list[dict[str, Any]] | None = None
    """Text, or the API's list of parts (text, images)."""


Conversation: TypeAlias = str | Sequence[ChatMessage | Message]
"""The turns of a conversation; a bare string is one turn of the user."""


def as_messages(conversation: Conversation) -> list[Message]:
    """The conversation as plain dicts, without keys that are None.

    Raises UserError when there is no turn, or a turn has no role.
    """
    if isinstance(conversation, str):
        return [{"role": "user", "content": conversation}]
    if not isinstance(conversation, Sequence) or not conversation:
        raise UserError("the conversation has no turns: give a string, or a list of messages with role and content")
    messages = []
    for number, turn in enumerate(conversation):
        message = turn.model_dump(exclude_none=True) if isinstance(turn, BaseModel) else turn
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"message {number} of the conversation is no dict with a role: {str(message)[:80]}")
        messages.append(message)
    return messages
