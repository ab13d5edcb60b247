"""ChatResponse: what a chat model answers."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


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
