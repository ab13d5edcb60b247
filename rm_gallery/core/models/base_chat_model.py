"""BaseChatModel: anything that answers a conversation."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rm_gallery.core.models.schema.oai.message import Conversation
from rm_gallery.core.models.schema.oai.response import ChatResponse
from rm_gallery.core.models.structured import ResponseFormat
from rm_gallery.errors import UserError


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

        def ask() -> ChatResponse:
            return asyncio.run(self.achat(messages, response_format, **kwargs))

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return ask()
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="chat") as thread:
            return thread.submit(ask).result()

    @property
    def is_reward_model(self) -> bool:
        """Whether the model gives rewards instead of text."""
        return False

    @property
    def reward_scorer(self) -> Any:
        """The RewardScorer behind a reward model, loaded on first use; None for every other model."""
        return None
