"""Endpoint: requests to an OpenAI-compatible API, made again where that helps, and after how long."""

from __future__ import annotations

import asyncio
import email.utils
import importlib.util
import logging
import math
import os
import random
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from rm_gallery.core.models.base_chat_model import ChatError
from rm_gallery.errors import UserError, one_line
from rm_gallery.schema import Message

log = logging.getLogger(__name__)


class RequestRefused(ChatError):
    """The endpoint takes the request for wrong (400 or 422)."""


class _Failed(Exception):
    """One try that failed; `final` when another would fail alike."""

    def __init__(self, reason: str, *, final: bool = False, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.final, self.retry_after = final, retry_after


class Endpoint:
    """Chat completions of one model at one address."""

    def __init__(
        self, model: str, *, api_key: str | None, base_url: str | None, timeout: float, policy: RetryPolicy
    ) -> None:
        """Raises UserError when the openai package or the key is missing."""
        if importlib.util.find_spec("openai") is None:
            raise UserError(f"model={model}: the openai package is missing; pip install 'rm-gallery[openai]'")
        self.model, self.timeout, self.policy = model, timeout, policy
        self.base_url = base_url or os.environ.get("OPENAI_BASE_URL") or None
        key = api_key or os.environ.get("OPENAI_API_KEY")
        if not key and self.base_url is None:
            raise UserError(
                f"model={model}: no API key; set OPENAI_API_KEY or pass api_key "
                "(for a server of your own pass base_url, for a checkpoint folder is_local=True)"
            )
        self._key = key or "none"  # the package wants one even for a server that asks for none
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[Any, AsyncGenerator[None]]]
        self._clients = WeakKeyDictionary()

    async def request(self, messages: list[Message], options: dict[str, Any]) -> tuple[Any, int]:
        """A completion with at least one choice, and the number of requests that it took.

        Raises RequestRefused for a request that the endpoint takes for wrong, ChatError when no try succeeds.
        """
        for attempt in range(self.policy.max_retries + 1):
            try:
                return await self._try(messages, options), attempt + 1
            except _Failed as failure:
                wait = failure.retry_after or 0.0
                too_long = wait > self.policy.max_retry_after
                if failure.final or too_long or attempt == self.policy.max_retries:
                    tries = f" after {attempt + 1} tries" if attempt else ""
                    asks = f"; it asks to wait {wait:.0f} s, come back then" if too_long else ""
                    raise ChatError(f"{self._where()}: {failure}{tries}{asks}") from failure.__cause__
                seconds = self.policy.delay(attempt, failure.retry_after)
                log.debug("%s: %s; next try in %.2f s", self._where(), failure, seconds)
            await asyncio.sleep(seconds)
        raise AssertionError("the last try returns or raises")

    async def _try(self, messages: list[Message], options: dict[str, Any]) -> Any:
        import openai

        client = await self._client()
        try:
            # The package's own timeout is one of silence; a server that trickles would hold the call for ever.
            async with asyncio.timeout(self.timeout):
                completion = await client.chat.completions.create(model=self.model, messages=messages, **options)
        except (TimeoutError, openai.APITimeoutError) as error:
            raise _Failed(f"no answer within {self.timeout:g} s") from error
        except openai.APIConnectionError as error:
            raise _Failed(f"no connection ({error.__cause__ or error})") from error
        except openai.APIStatusError as error:
            self._raise_for(error.status_code, error, read_retry_after(error.response.headers))
        except openai.APIError as error:
            raise _Failed(f"unreadable answer ({self._short(error)})") from error
        except TypeError as error:
            raise UserError(
                f"{self._where()}: {self._short(error)}; options beyond the OpenAI API go into extra_body"
            ) from error
        except ValueError as error:
            raise _Failed(f"unreadable answer ({self._short(error)})") from error
        if not getattr(completion, "choices", None):
            raise _Failed("an answer without choices")
        return completion

    def _raise_for(self, status: int, error: Any, retry_after: float | None) -> None:
        reason = f"HTTP {status} ({self._short(error)})"
        if status in (400, 422):
            raise RequestRefused(f"{self._where()}: {reason}") from error
        if status in (401, 403):
            reason += "; set OPENAI_API_KEY or pass api_key, for this base_url"
        spent = getattr(error, "code", None) == "insufficient_quota"
        final = spent or not (status in RETRIED_STATUS or status >= 500)
        raise _Failed(reason, final=final, retry_after=retry_after) from error

    def _where(self) -> str:
        return f"model={self.model} at {self.base_url or 'api.openai.com'}"

    def _short(self, error: Any) -> str:
        body = getattr(error, "body", None)
        message = body.get("message") if isinstance(body, dict) else None
        text = str(message or error)
        return one_line(text.replace(self._key, "***") if len(self._key) > 6 else text)

    async def _client(self) -> Any:
        """The client of the running event loop: connections cannot pass from one loop to another."""
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            from openai import AsyncOpenAI

            client = AsyncOpenAI(api_key=self._key, base_url=self.base_url, timeout=self.timeout, max_retries=0)
            closing = self._close_with_loop(loop, client)
            self._clients[loop] = (client, closing)
            await anext(closing)
        return self._clients[loop][0]

    async def _close_with_loop(self, loop: asyncio.AbstractEventLoop, client: Any) -> AsyncGenerator[None]:
        # asyncio.run ends every generator that was begun in its loop: the one hook that a loop has for its end.
        try:
            yield
        finally:
            self._clients.pop(loop, None)
            await client.close()


RETRIED_STATUS = (408, 409, 429)
"""Beside every 5xx."""


@dataclass(frozen=True)
class RetryPolicy:
    """Waits that double from one try to the next, drawn at random so that many callers do not return together."""

    max_retries: int = 5
    first_delay: float = 0.5
    """Seconds before the first retry, at most; at least half of it."""
    max_delay: float = 30.0
    """Seconds that the doubling stops at."""
    max_retry_after: float = 300.0
    """Seconds; an endpoint that asks for a longer wait is not waited for."""

    def delay(self, attempt: int, retry_after: float | None = None) -> float:
        """Seconds to wait after the failed try number `attempt`, counted from 0.

        retry_after: seconds that the endpoint asked for; never returns before them.
        """
        if retry_after is not None:
            return retry_after * random.uniform(1.0, 1.1)
        return min(self.max_delay, self.first_delay * 2.0**attempt) * random.uniform(0.5, 1.0)


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the headers ask to wait, from a number or a date; None when they ask for nothing."""
    try:
        if text := headers.get("retry-after-ms"):
            seconds = float(text) / 1000
        elif text := headers.get("retry-after"):
            try:
                seconds = float(text)
            except ValueError:
                seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        else:
            return None
    except (TypeError, ValueError):
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
