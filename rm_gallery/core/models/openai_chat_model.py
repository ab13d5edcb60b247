"""OpenAIChatModel: a model behind an OpenAI-compatible endpoint, or in a checkpoint folder."""

from __future__ import annotations

from typing import Any

from rm_gallery.core.models.base_chat_model import BaseChatModel, ChatError
from rm_gallery.core.models.endpoint import Endpoint, RequestRefused, RetryPolicy
from rm_gallery.core.models.local import LocalGenerator, LocalRewardModel, open_folder
from rm_gallery.core.models.schema.oai.message import Conversation, as_messages
from rm_gallery.core.models.schema.oai.response import ChatResponse, Usage
from rm_gallery.core.models.structured import (
    ParseError,
    ResponseFormat,
    parse_answer,
    request_format,
    with_instruction,
)


class OpenAIChatModel(BaseChatModel):
    """Answers over an API, or from a folder on this machine.

    A folder with a sequence classification checkpoint answers with the reward of the conversation it is given; one
    with a causal language model generates. A folder is loaded when it is first used, once for all models that name it.
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
        retry_delay: float = 0.5,
        device: str = "auto",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        """model: what the endpoint calls it, or with `is_local` the checkpoint folder.

        api_key, base_url: by default from the environment, OPENAI_API_KEY and OPENAI_BASE_URL.
        timeout: seconds for one request as a whole. max_retries, retry_delay: after 429, 5xx, a lost connection,
        silence or an empty answer, at first `retry_delay` seconds later, then doubling; Retry-After is honoured.
        device, dtype: of a folder; `auto` takes a GPU and bfloat16 when there is one, else float32.
        trust_remote_code: run the code that lies in the folder, for architectures that transformers does not have.
        options: sent with every request (temperature, max_tokens, extra_body, ...).
        Raises UserError for a folder that holds no model, and a missing package or key.
        """
        super().__init__(model)
        self.is_local, self.options = is_local, options
        self._local: LocalRewardModel | LocalGenerator | None = None
        self._endpoint: Endpoint | None = None
        self._takes_format = True
        if is_local:
            self._local = open_folder(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        else:
            policy = RetryPolicy(max_retries, retry_delay)
            self._endpoint = Endpoint(model, api_key=api_key, base_url=base_url, timeout=timeout, policy=policy)

    @property
    def is_reward_model(self) -> bool:
        return isinstance(self._local, LocalRewardModel)

    @property
    def reward_scorer(self) -> Any:
        """The RewardScorer of a reward model's folder, loaded on first use (seconds to minutes); None for others."""
        return self._local.scorer() if isinstance(self._local, LocalRewardModel) else None

    async def achat(
        self, messages: Conversation, response_format: ResponseFormat | None = None, **kwargs: Any
    ) -> ChatResponse:
        """The answer to a conversation; see `BaseChatModel.achat` for the arguments.

        Of a reward model: `content` is the reward as a number in text, `parsed` is {"reward": x}; options mean nothing.
        """
        turns = as_messages(messages)
        options = {**self.options, **kwargs}
        if isinstance(self._local, LocalRewardModel):
            return await self._local.achat(turns)
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
        # An endpoint that promises JSON of any shape must still be told which.
        asked = in_prompt if sent["type"] == "json_object" else turns
        try:
            return self._read(*await self._endpoint.request(asked, {**options, "response_format": sent}))
        except RequestRefused:
            completion, attempts = await self._endpoint.request(in_prompt, options)
        self._takes_format = False  # the same without the format is answered: remember it
        return self._read(completion, attempts + 1)

    def _read(self, completion: Any, attempts: int) -> ChatResponse:
        choice = completion.choices[0]
        message, reason = choice.message, choice.finish_reason
        content = getattr(message, "content", None)
        if not content:
            refusal = getattr(message, "refusal", None)
            why = f"refused ({refusal})" if refusal else f"an answer without text (finish_reason={reason})"
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
