"""OpenAIChatModel: a model behind an OpenAI-compatible endpoint, or in a checkpoint folder."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import AsyncGenerator
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit
from weakref import WeakKeyDictionary

from rm_gallery.core.models.base_chat_model import (
    BaseChatModel,
    ChatError,
    ChatResponse,
    Conversation,
    Usage,
    as_messages,
)
from rm_gallery.core.models.local import LocalGenerator, LocalRewardModel, open_folder
from rm_gallery.core.models.structured import (
    ParseError,
    ResponseFormat,
    parse_answer,
    request_format,
    with_instruction,
)
from rm_gallery.errors import UserError, one_line
from rm_gallery.safe_text import register_secret, scrub
from rm_gallery.schema import Message

_MAX_BACKOFF_S = 8.0  # of the openai package


class OpenAIChatModel(BaseChatModel):
    """A model at an OpenAI-compatible endpoint, or with `is_local` in a checkpoint folder.

    A sequence-classification checkpoint returns the reward of a conversation; a causal language model generates text.
    A folder is loaded on first use, once per process.
    """

    def __init__(
        self,
        model: str,
        *,
        api_key: str | None = None,
        base_url: str | None = None,
        is_local: bool = False,
        timeout: float = 120.0,
        max_retries: int = 5,
        device: str = "auto",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        base: str | None = None,
        normalize: bool | None = None,
        quantized: bool = True,
        ensemble: str = "mean",
        **options: Any,
    ) -> None:
        """model: name at the endpoint, or with `is_local` the checkpoint folder, or reward model folders joined by +.

        api_key, base_url: default to the environment variables OPENAI_API_KEY and OPENAI_BASE_URL.
        timeout: seconds without data until a request fails; all tries of a call together may take
        `(max_retries + 1) * (timeout + 8)`. max_retries: after 408, 409, 429, 5xx, a lost connection and a timeout, by
        the openai package: it backs off from 0.5 to 8 seconds, honours Retry-After up to two minutes, and logs each
        retry at level INFO. An exceeded quota is not retried.
        device, dtype: for a folder; `auto` is a GPU with bfloat16 if there is one, else the CPU with float32.
        trust_remote_code: run model code from the folder, for architectures that transformers does not have.
        base: for the folder of an adapter (LoRA), its base model, if it is not the one that adapter_config.json names.
        normalize: for the folder of a reward model, return (reward - mean) / std of its validation rewards.
        normalize, ensemble: for an ensemble `A+B`, see `RewardScorer.from_folders` (there `reduce`).
        quantized: for the folder of an adapter whose base model was quantized in training (QLoRA), quantize it the same
        way; False uses the base model that is not quantized.
        options: sent with every request (temperature, max_tokens, extra_body, ...).
        Raises UserError for a folder without a model, and for a missing package or API key.
        """
        super().__init__(model)
        self.is_local, self.options = is_local, options
        forms = ["normalized"] * bool(normalize) + [ensemble] * (ensemble != "mean")
        self.reward_form = " ".join(forms)  # another one is another grader when a run is resumed
        self._local: LocalRewardModel | LocalGenerator | None = None
        self._endpoint: _Endpoint | None = None
        self._takes_format = True
        if is_local:
            self._local = open_folder(
                model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, base=base, normalize=normalize,
                quantized=quantized, ensemble=ensemble,
            )  # fmt: skip
        else:
            self._endpoint = _Endpoint(model, api_key, base_url, timeout, max_retries)

    @property
    def is_reward_model(self) -> bool:
        return isinstance(self._local, LocalRewardModel)

    @property
    def reward_scorer(self) -> Any:
        """The RewardScorer of a reward model, loaded on first use (seconds to minutes); None for other models."""
        return self._local.scorer() if isinstance(self._local, LocalRewardModel) else None

    async def achat(
        self, messages: Conversation, response_format: ResponseFormat | None = None, **kwargs: Any
    ) -> ChatResponse:
        """Respond to a conversation; see `BaseChatModel.achat` for the arguments.

        For a reward model `content` is the reward as text and `parsed` is {"reward": x}; it reads no option but
        `tools`.
        """
        turns = as_messages(messages)
        options = {**self.options, **kwargs}
        if isinstance(self._local, LocalRewardModel):
            return await self._local.achat(turns, options.get("tools"))
        if isinstance(self._local, LocalGenerator):
            asked = with_instruction(turns, response_format) if response_format else turns
            response = await self._local.achat(asked, options)
        else:
            response = await self._ask(turns, response_format, options)
        return _parse(response, response_format) if response_format else response

    async def _ask(self, turns: Any, response_format: ResponseFormat | None, options: dict[str, Any]) -> ChatResponse:
        assert self._endpoint is not None
        if response_format is None:
            return self._read(*await self._endpoint.request(turns, options))
        in_prompt = with_instruction(turns, response_format)
        if not self._takes_format:
            return self._read(*await self._endpoint.request(in_prompt, options))
        sent = request_format(response_format)
        # `json_object` allows any JSON, so the prompt has to describe the schema.
        asked = in_prompt if sent["type"] == "json_object" else turns
        try:
            return self._read(*await self._endpoint.request(asked, {**options, "response_format": sent}))
        except _RequestRefused:
            completion, attempts = await self._endpoint.request(in_prompt, options)
        self._takes_format = False  # the endpoint does not support it: do not send it again
        return self._read(completion, attempts + 1)

    def _read(self, completion: Any, attempts: int) -> ChatResponse:
        choice = completion.choices[0]
        message, reason = choice.message, choice.finish_reason
        content = getattr(message, "content", None)
        if not content:
            refusal = getattr(message, "refusal", None)
            why = f"refused ({refusal})" if refusal else f"a response without text (finish_reason={reason})"
            raise ChatError(f"model={self.model}: {why}" + ("; raise max_tokens" if reason == "length" else ""))
        used = getattr(completion, "usage", None)
        usage = None
        if used is not None:
            names = ("prompt_tokens", "completion_tokens", "total_tokens")
            usage = Usage(**{name: getattr(used, name, None) or 0 for name in names})
        metadata = {"model": completion.model, "finish_reason": reason, "attempts": attempts}
        return ChatResponse(content=content, usage=usage, metadata=metadata)

    def __repr__(self) -> str:
        return f"OpenAIChatModel(model={self.model!r}, is_local={self.is_local})"


def _parse(response: ChatResponse, response_format: ResponseFormat) -> ChatResponse:
    try:
        response.parsed = parse_answer(response.content, response_format)
    except ParseError as error:
        cut = "; cut off at max_tokens" if response.metadata.get("finish_reason") == "length" else ""
        response.metadata["parse_error"] = f"{error}{cut}"
    return response


class _RequestRefused(ChatError):
    """The endpoint rejects the request as invalid (400 or 422)."""


class _Endpoint:
    """Chat completions of one model at one address, with the retries of the openai package."""

    def __init__(self, model: str, api_key: str | None, base_url: str | None, timeout: float, max_retries: int) -> None:
        """Raises UserError when the openai package or the key is missing."""
        if importlib.util.find_spec("openai") is None:
            raise UserError(f"model={model}: the openai package is missing; pip install 'rm-gallery[openai]'")
        self.model, self.timeout, self.max_retries = model, timeout, max_retries
        self.base_url, self._user = _split_user(base_url or os.environ.get("OPENAI_BASE_URL") or None)
        key = api_key or os.environ.get("OPENAI_API_KEY")
        if not key and self.base_url is None:
            raise UserError(
                f"model={model}: no API key; set OPENAI_API_KEY or pass api_key "
                "(for your own server pass base_url, for a checkpoint folder is_local=True)"
            )
        self._key = key or "none"  # the package requires one, even for a server that does not
        for secret in (self._key, *(self._user or ())):
            register_secret(secret)
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[Any, AsyncGenerator[None]]]
        self._clients = WeakKeyDictionary()

    async def request(self, messages: list[Message], options: dict[str, Any]) -> tuple[Any, int]:
        """A completion with at least one choice, and the number of requests.

        Raises _RequestRefused for a request that the endpoint rejects, ChatError when all tries fail.
        """
        import openai

        where = f"model={self.model} at {self.base_url or 'api.openai.com'}"
        tries = f" after {self.max_retries + 1} tries" if self.max_retries else ""
        total = (self.max_retries + 1) * (self.timeout + _MAX_BACKOFF_S)
        client = await self._client()
        try:
            # The package's own timeout restarts with each byte that a server sends.
            async with asyncio.timeout(total):
                create = client.chat.completions.with_raw_response.create
                raw = await create(model=self.model, messages=messages, **options)
            completion, attempts = raw.parse(), raw.retries_taken + 1
        except openai.APITimeoutError as error:
            raise ChatError(f"{where}: no response within {self.timeout:g} s{tries}") from scrub(error)
        except TimeoutError as error:
            raise ChatError(f"{where}: no complete response within {total:g} s, retries included") from scrub(error)
        except openai.APIConnectionError as error:
            raise ChatError(f"{where}: no connection ({error.__cause__ or error}){tries}") from scrub(error)
        except openai.APIStatusError as error:
            raise self._describe(where, error) from scrub(error)
        except TypeError as error:
            raise UserError(
                f"{where}: {self._short(error)}; options beyond the OpenAI API go into extra_body"
            ) from scrub(error)
        except (openai.APIError, ValueError) as error:
            raise ChatError(f"{where}: unreadable response ({self._short(error)})") from scrub(error)
        if not getattr(completion, "choices", None):
            raise ChatError(f"{where}: a response without choices")
        return completion, attempts

    def _describe(self, where: str, error: Any) -> ChatError:
        status, headers = error.status_code, error.response.headers
        reason = f"{where}: HTTP {status} ({self._short(error)})"
        if status in (400, 422):
            return _RequestRefused(reason)
        if status in (401, 403):
            reason += "; set OPENAI_API_KEY or pass api_key, for this base_url"
        retries = int(error.request.headers.get("x-stainless-retry-count", 0))
        reason += f" after {retries + 1} tries" if retries else ""
        if status in (429, 503) and not retries and headers.get("retry-after"):
            reason += f"; it asks to retry after {headers['retry-after']} s"
        return ChatError(reason)

    def _short(self, error: Any) -> str:
        body = getattr(error, "body", None)
        message = body.get("message") if isinstance(body, dict) else None
        text = str(message or error)
        return one_line(text.replace(self._key, "***") if len(self._key) > 6 else text)

    async def _client(self) -> Any:
        """The client of the running event loop: connections belong to one loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            from openai import AsyncOpenAI, DefaultAsyncHttpxClient

            client = AsyncOpenAI(
                api_key=self._key, base_url=self.base_url, timeout=self.timeout, max_retries=self.max_retries,
                http_client=DefaultAsyncHttpxClient(auth=self._user, event_hooks={"response": [_do_not_retry_quota]}),
            )  # fmt: skip
            closing = self._close_with_loop(loop, client)
            self._clients[loop] = (client, closing)
            await anext(closing)
        return self._clients[loop][0]

    async def _close_with_loop(self, loop: asyncio.AbstractEventLoop, client: Any) -> AsyncGenerator[None]:
        # asyncio.run closes the async generators of its loop: the only hook for the end of a loop.
        try:
            yield
        finally:
            self._clients.pop(loop, None)
            await client.close()


def _split_user(url: str | None) -> tuple[str | None, tuple[str, str] | None]:
    """A URL without user and password, which the HTTP library would log, and these two."""
    try:
        parts = urlsplit(url or "")
        if not url or parts.username is None:
            return url, None
    except ValueError:  # the HTTP library rejects it
        return url, None
    plain = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return plain, (unquote(parts.username), unquote(parts.password or ""))


async def _do_not_retry_quota(response: Any) -> None:
    """An exceeded quota has the status of a rate limit, 429, but waiting does not help."""
    if response.status_code == 429:
        await response.aread()
        if "insufficient_quota" in response.text:
            response.headers["x-should-retry"] = "false"
