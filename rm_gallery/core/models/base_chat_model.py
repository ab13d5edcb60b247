"""BaseChatModel: anything that answers a conversation; the messages that it takes and the response that it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from rm_gallery.core.models.structured import ResponseFormat
from rm_gallery.core.run_sync import run_sync
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


class Usage(BaseModel):
    """Tokens that a call took; 0 where the endpoint does not say."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class ChatResponse(BaseModel):
    """One answer."""

    role: str = "assistant"
    content: str = ""
    """The answer as text; of a reward model the reward, as a number in text."""
    parsed: Any = None
    """With `response_format`: an instance of the pydantic class that was given, else the decoded JSON.

    None when the answer does not fit, with the reason in `metadata["parse_error"]`. Of a reward model `{"reward": x}`.
    """
    usage: Usage | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    """`model`, `finish_reason`, `attempts` (requests made), and what the model itself adds."""


class ChatError(UserError):
    """A model gave no usable answer: refused, unreachable after every retry, or empty."""


class BaseChatModel(ABC):
    """Answers conversations. A subclass writes `achat`."""

    def __init__(self, model: str) -> None:
        """model: the name an endpoint knows it by, or a checkpoint folder."""
        self.model = model

    @abstractmethod
    async def achat(
        self, messages: Conversation, response_format: ResponseFormat | None = None, **kwargs: Any
    ) -> ChatResponse:
        """The answer to a conversation.

        response_format: a pydantic class or a JSON schema that the answer must follow; see `ChatResponse.parsed`.
        kwargs: options of this one request, such as temperature or max_tokens.
        Raises ChatError when the model gives no answer.
        """

    def chat(
        self, messages: Conversation, response_format: ResponseFormat | None = None, **kwargs: Any
    ) -> ChatResponse:
        """`achat` for code that does not await; in a running event loop (a notebook) it blocks that loop."""

        return run_sync(self.achat(messages, response_format, **kwargs))

    @property
    def is_reward_model(self) -> bool:
        """Whether the model gives rewards instead of text."""
        return False

    @property
    def reward_scorer(self) -> Any:
        """The RewardScorer behind a reward model, loaded on first use; None for every other model."""
        return None
