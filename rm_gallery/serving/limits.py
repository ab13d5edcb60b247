"""What a server accepts, and the answer to a request that it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rm_gallery.errors import UserError

CHARACTERS_PER_TOKEN = 32
"""A longer text is refused before it is tokenized, which would take 150 times its size in memory."""


@dataclass(frozen=True)
class Limits:
    """Of requests. Each is the option of the same name."""

    max_body_mb: float = 16.0
    max_texts: int = 2048
    """Of one request; a response with its prompt is one text."""
    max_length: int | None = None
    """Tokens of a text; None: positions of the model, or max_length of its training if that is longer."""
    max_waiting: int = 8192
    """Texts of all requests to a model that are accepted and not finished."""
    prefix_cache_mb: float = 0.0
    """MiB of keys and values of prompts, for each model; 0 for none."""
    body_timeout: float = 60.0
    """Seconds in which a body has to arrive."""

    def check(self) -> None:
        """Raises UserError for limits that accept nothing."""
        for name in ("max_body_mb", "max_texts", "max_waiting"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name.replace('_', '-')}={getattr(self, name)}: must be above 0")
        if self.prefix_cache_mb < 0:
            raise UserError(f"--prefix-cache-mb={self.prefix_cache_mb:g}: must be at least 0")
        if self.max_length is not None and self.max_length <= 0:
            raise UserError(f"--max-length={self.max_length}: must be above 0")
        if self.max_texts > self.max_waiting:
            raise UserError(
                f"--max-waiting={self.max_waiting} is below --max-texts={self.max_texts}, so such a request never fits"
            )

    @property
    def body_bytes(self) -> int:
        return int(self.max_body_mb * 2**20)


_TYPES = {401: "AuthenticationError", 404: "NotFoundError", 429: "RateLimitError", 500: "InternalServerError"}


@dataclass(eq=False)
class Refused(Exception):
    """A request that gets an answer other than 200, in the shape of OpenAI's and vLLM's."""

    status: int
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = _TYPES.get(self.status, "BadRequestError")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}


def bad_request(message: str, param: str | None = None) -> Refused:
    return Refused(400, f"{param}: {message}" if param else message, param)
