"""BaseChatModel: the interface of chat models, with its input (ChatMessage) and output (ChatResponse)."""

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
    """One message in the shape of the OpenAI API; extra keys (tool calls, names) are kept."""

    model_config = ConfigDict(extra="allow")

    role: str = "user"
    content: str | list[dict[str, Any]] | None = None
    """Text, or a list of content parts (text, images)."""


Conversation: TypeAlias = str | Sequence[ChatMessage | Message]
"""Messages; a string is one user message."""


def as_messages(conversation: Conversation) -> list[Message]:
    """The messages as dictionaries, without keys that are None.

    Raises UserError for an empty conversation and for a message without a role.
    """
    if isinstance(conversation, str):
        return [{"role": "user", "content": conversation}]
    if not isinstance(conversation, Sequence) or not conversation:
        raise UserError("the conversation has no messages: give a string, or a list of messages with role and content")
    messages = []
    for number, turn in enumerate(conversation):
        message = turn.model_dump(exclude_none=True) if isinstance(turn, BaseModel) else turn
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"message {number} of the conversation is not a dict with a role: {str(message)[:80]}")
        messages.append(message)
    return messages


class Usage(BaseModel):
    """Tokens of a request; 0 if the endpoint does not report them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class ChatResponse(BaseModel):
    """A response of a chat model."""

    role: str = "assistant"
    content: str = ""
    """The text; for a reward model the reward, formatted as text."""
    parsed: Any = None
    """With `response_format`: an instance of the given pydantic class, or the decoded JSON.

    None if the response does not match; `metadata["parse_error"]` has the reason. For a reward model `{"reward": x}`.
    """
    usage: Usage | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    """`model`, `finish_reason`, `attempts` (number of requests) and fields of the model."""


class ChatError(UserError):
    """A model gave no usable response: refused, unreachable after all retries, or empty."""


class BaseChatModel(ABC):
    """Base class of chat models. Subclasses implement `achat`."""

    def __init__(self, model: str) -> None:
        """model: name at the endpoint, or a checkpoint folder."""
        self.model = model

    @abstractmethod
    async def achat(
        self, messages: Conversation, response_format: ResponseFormat | None = None, **kwargs: Any
    ) -> ChatResponse:
        """Respond to a conversation.

        response_format: a pydantic class or JSON schema that the response must match; see `ChatResponse.parsed`.
        kwargs: options of this request, such as temperature or max_tokens.
        Raises ChatError when the model gives no response.
        """

    def chat(
        self, messages: Conversation, response_format: ResponseFormat | None = None, **kwargs: Any
    ) -> ChatResponse:
        """Synchronous `achat`; blocks the event loop if one is running."""

        return run_sync(self.achat(messages, response_format, **kwargs))

    @property
    def is_reward_model(self) -> bool:
        """Whether the model outputs rewards instead of text."""
        return False

    @property
    def reward_scorer(self) -> Any:
        """The RewardScorer of a reward model, loaded on first use; None for other models."""
        return None
