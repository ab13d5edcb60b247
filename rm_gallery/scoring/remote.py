"""RemoteScorer: rewards from a server, with the methods of RewardScorer. Does not load torch unless given a folder.

With a tokenizer, texts are rendered and tokenized here, as in training, and the server gets token ids where its
protocol has them: no second BOS, and no content that forges a turn. Without one, the server renders conversations.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from rm_gallery.data.tokenization.encoder import Encoder
from rm_gallery.data.tokenization.template_date import freeze_date
from rm_gallery.data.tokenization.tokenizer import TokenizeConfig, load_tokenizer
from rm_gallery.errors import BadRow, UserError
from rm_gallery.safe_text import register_secret
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring.base import BaseScorer, Rewards, find_bad_reward, raise_first
from rm_gallery.scoring.inputs import InputBuilder, check_group
from rm_gallery.scoring.remote_http import Endpoints, split_url
from rm_gallery.scoring.remote_protocols import (
    Batch,
    Chat,
    Input,
    RefusedText,
    Served,
    batches_of,
    find_protocol,
    request_of,
    rewards_of,
)

log = logging.getLogger(__name__)

KEY_VARIABLE = "RM_GALLERY_API_KEY"
_MAX_SUSPECT = 32  # rewards in [0, 1] until a warning
_SERVERS = re.compile(r"(?:(?P<protocol>[A-Za-z][\w-]*):)?(?P<urls>https?://[^#]*)(?:#(?P<model>.*))?", re.DOTALL)

_Encoded: TypeAlias = list[Input] | Exception


class RemoteScorer(BaseScorer):
    """Scores responses with a reward model behind a server: vLLM, SGLang, OpenRLHF or RM-Gallery.

    Rewards keep the order of the texts. Requests run in threads; the scorer may be shared by threads, event loops and
    forked processes, and pickled. `close` ends them.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        protocol: str = "auto",
        *,
        model: str | None = None,
        tokenizer: Any = None,
        api_key: str | None = None,
        timeout: float = 120.0,
        retries: int = 5,
        concurrency: int = 16,
        template_date: str | None = None,
    ) -> None:
        """url: of a server, or of several with the same model, which are used in turn; one that fails is skipped.

        protocol: `vllm`, `vllm-pooling`, `sglang` or `openrlhf`; `auto` asks the server. model: name at the server;
        None if it has only one. tokenizer: the folder or hub name of the served model, or its tokenizer: texts are
        rendered and tokenized as in training. None: vLLM and RM-Gallery render conversations; the others need it.
        api_key: default the environment variable RM_GALLERY_API_KEY. timeout: seconds for a request with all of its
        retries. retries: after lost connections, 429 and 5xx, with exponential backoff, or as Retry-After says.
        concurrency: maximum requests at a time. template_date: see `RewardScorer.from_folder`.

        Raises UserError if no server answers, or if it does not say which protocol it speaks.
        """
        urls = [url] if isinstance(url, str) else list(url)
        if not urls or timeout <= 0 or retries < 0 or concurrency < 1:
            raise UserError("RemoteScorer needs a URL, timeout > 0, retries >= 0 and concurrency >= 1")
        self._settings = {
            "url": urls, "protocol": protocol, "model": model, "tokenizer": tokenizer, "api_key": api_key,
            "timeout": timeout, "retries": retries, "concurrency": concurrency, "template_date": template_date,
        }  # fmt: skip
        split = [split_url(each) for each in urls]
        chosen = find_protocol(protocol) or next((each for _, each in split if each is not None), None)
        self._texts = _Texts(tokenizer, template_date)
        self.inputs = self._texts.inputs
        limits = {"timeout": timeout, "retries": retries, "concurrency": concurrency}
        self._endpoints = Endpoints([each for each, _ in split], chosen, model, api_key=_key(api_key), **limits)  # type: ignore[arg-type]
        served = self._endpoints.served
        self.protocol, self.model = served.protocol.name, served.model
        self.folder = ",".join(each for each, _ in split) + (f"#{self.model}" if self.model else "")
        self._scale = _Scale()
        log.info("%s: %s", self.folder, served.protocol.title)

    def __repr__(self) -> str:
        return f"RemoteScorer({self.folder!r}, protocol={self.protocol!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy asks the servers again."""
        return _make, (self._settings,)

    def score(self, groups: Sequence[PreferenceGroup]) -> Rewards:
        """One list of K rewards per group, in the order of its responses.

        Raises UserError for a text that the server refuses, a reward that is not finite, an answer of the wrong shape
        or one that went through a sigmoid or softmax, and for servers that do not answer in time.
        """
        groups = self.fitted(groups)
        return raise_first(self._score(groups), groups)

    def score_each(self, groups: Sequence[PreferenceGroup], *, attributes: bool = False) -> list[list[Any] | Exception]:
        """Like `score`, with an exception in place of the rewards of a group that cannot be scored."""
        return self._score(self.fitted(groups))

    async def ascore(self, groups: Sequence[PreferenceGroup]) -> Rewards:
        """Async `score`."""
        groups = self.fitted(groups)
        encoded = await asyncio.to_thread(self._encode, groups)
        batches, futures = self._submit(encoded)
        try:
            found = await asyncio.gather(*map(asyncio.wrap_future, futures))
        finally:
            _cancel(futures)
        return raise_first(_joined(encoded, batches, found), groups)

    def close(self) -> None:
        """End the threads and connections; calls that wait for a server fail. Idempotent."""
        self._endpoints.close()

    def _score(self, groups: Sequence[PreferenceGroup]) -> list[list[Any] | Exception]:
        encoded = self._encode(groups)
        batches, futures = self._submit(encoded)
        try:
            return _joined(encoded, batches, [future.result() for future in futures])
        finally:
            _cancel(futures)

    def _encode(self, groups: Sequence[PreferenceGroup]) -> list[_Encoded]:
        served = self._endpoints.served
        return [self._texts.encode(group, served) for group in groups]

    def _submit(self, encoded: Sequence[_Encoded]) -> tuple[list[Batch], list[Future[list[float | Exception]]]]:
        """The requests, and a future for each."""
        batches = batches_of(self._endpoints.served, [each for each in encoded if not isinstance(each, Exception)])
        pool = self._endpoints.pool() if batches else None
        return batches, [pool.submit(self._ask, batch) for batch in batches] if pool is not None else []

    def _ask(self, batch: Batch) -> list[float | Exception]:
        """The reward of each input, or why it has none; a text that is refused does not affect the others."""
        try:
            answer, served = self._endpoints.send(lambda served: request_of(served, batch))
            _check_tokens(batch.inputs, answer)
        except RefusedText as error:
            if len(batch.inputs) == 1:
                return [BadRow(str(error))]
            first, second = batch.halves()
            return self._ask(first) + self._ask(second)
        try:
            rewards = rewards_of(served, answer, len(batch.inputs))
            self._scale.check(rewards, served)
        except UserError as error:
            raise UserError(f"{self.folder}: {error}") from None
        return list(rewards)


def open_servers(text: str, **settings: Any) -> RemoteScorer:
    """The scorer of `[PROTOCOL:]URL[,URL...][#MODEL]`. settings: see `RemoteScorer`."""
    found = _SERVERS.fullmatch(text)
    assert found is not None, text
    urls = [url.strip() for url in found["urls"].split(",")]
    return RemoteScorer(urls, found["protocol"] or "auto", model=found["model"] or None, **settings)


def names_servers(text: str) -> bool:
    """Whether a model is of the form that `open_servers` takes."""
    return _SERVERS.fullmatch(text) is not None


def short_name(text: str) -> str:
    """A name for tables: `host:port`, or `host:port#model`."""
    found = _SERVERS.fullmatch(text)
    assert found is not None, text
    hosts = [urlsplit(url.strip()).netloc.rpartition("@")[2] for url in found["urls"].split(",")]
    return ",".join(hosts) + (f"#{found['model']}" if found["model"] else "")


class _Texts:
    """Turns groups into what the server gets."""

    def __init__(self, tokenizer: Any, template_date: str | None) -> None:
        """Raises UserError for a folder without a tokenizer."""
        self._encoder: Encoder | None = None
        self._closing: list[int] = []
        self._lock = threading.RLock()  # fast tokenizers are not thread-safe
        if tokenizer is None:
            self.inputs = InputBuilder("chat")
            return
        config = TokenizeConfig(filter_overlong_prompts=False)
        separator, style = "\n\n", None
        if isinstance(tokenizer, str | Path):
            from rm_gallery.modeling.export import read_record
            from rm_gallery.scoring.model_folder import file_of

            folder = str(tokenizer)
            tokenizer = load_tokenizer(folder, key="tokenizer")
            freeze_date(tokenizer, template_date, key="template_date")
            file = file_of(folder, "config.json")
            if file is not None:
                token = json.loads(file.read_text(encoding="utf-8")).get("reward_token_id")
                self._closing = [token] if isinstance(token, int) and token >= 0 else []
            record = read_record(file.parent) if file is not None else None
            if record is not None:
                style, separator = record.input_style, record.separator
                config = TokenizeConfig(
                    filter_overlong_prompts=False,
                    append_eos=record.append_eos,
                    text_special_tokens=record.text_special_tokens,
                )
                if record.own_rendering:
                    log.warning(
                        "tokenizer=%s: a data.custom_cls rendered the texts of training; pass such texts", folder
                    )
        reads_tools = "tools" in str(tokenizer.chat_template)
        self.inputs = InputBuilder(
            style or ("chat" if tokenizer.chat_template else "text"), separator, reads_tools=reads_tools
        )
        self._encoder = Encoder(tokenizer, config)

    def encode(self, group: PreferenceGroup, served: Served) -> _Encoded:
        """One input per response. Raises UserError for a conversation that nothing can render."""
        try:
            check_group(group)
            return self._with_tokenizer(group, served) if self._encoder is not None else self._without(group, served)
        except BadRow as error:
            return error

    def _with_tokenizer(self, group: PreferenceGroup, served: Served) -> list[Input]:
        encoder = self._encoder
        assert encoder is not None
        with self._lock:
            ids = [[*each, *self._closing] for each in encoder.encode(group)]
            if served.protocol.takes == "tokens":
                return [*ids]
            return [self._text_of(text, each) for text, each in zip(encoder.render(group), ids, strict=True)]

    def _text_of(self, text: str, ids: list[int]) -> str:
        """The text that a server tokenizes to `ids` without adding special tokens."""
        assert self._encoder is not None
        tokenizer = self._encoder.tokenizer
        for candidate in (text, tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)):
            if tokenizer(candidate, add_special_tokens=False, verbose=False)["input_ids"] == ids:
                return candidate
        raise BadRow("no text that the server would tokenize as in training, e.g. for a control token in a content")

    def _without(self, group: PreferenceGroup, served: Served) -> list[Input]:
        if group.style == "text":
            found: list[Input] = [f"{group.prompt}{response}" for response in group.responses]
        elif not served.protocol.renders:
            raise UserError(
                f"{served.protocol.title} takes texts, not conversations: pass tokenizer=, the folder of the served "
                "model (evaluate: --tokenizer)"
            )
        elif group.metadata.get("tools") and not served.batches_chats:
            raise BadRow("tools, which the server does not take: pass tokenizer= (evaluate: --tokenizer)")
        else:
            found = [Chat(group.prompt, response, group.metadata.get("tools")) for response in group.responses]  # type: ignore[arg-type]
        try:
            for each in found:
                text = [each.messages, each.tools] if isinstance(each, Chat) else each
                json.dumps(text, ensure_ascii=False, allow_nan=False).encode()
        except (UnicodeEncodeError, TypeError, ValueError, RecursionError) as error:
            raise BadRow(f"not JSON: {type(error).__name__}") from error
        return found


class _Scale:
    """Finds answers that went through a sigmoid, a softmax over one label, or a normalization."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count, self._is_raw, self._is_one, self._warned = 0, False, True, False

    def check(self, rewards: Sequence[float], served: Served) -> None:
        """Raises UserError for such answers; warns where the server does not say whether it applies one."""
        rewards = [each for each in rewards if math.isfinite(each)]
        with self._lock:
            self._count += len(rewards)
            self._is_raw = self._is_raw or not all(0 <= each <= 1 for each in rewards)
            self._is_one = self._is_one and all(abs(each) == 1 for each in rewards)
            if self._is_one and self._count > 3:
                raise UserError(
                    "all rewards are 1 or -1: the server applies a softmax over its one label, or normalizes; turn it "
                    "off there"
                )
            if self._is_raw or served.activation == "off":
                return
            how = "rewards between 0 and 1"
            fix = 'config.json of the served model needs "problem_type": "regression", or the server an update'
            if served.activation == "on":
                raise UserError(f"{how}: the server applies a sigmoid and has no field to turn it off; {fix}")
            if self._count >= _MAX_SUSPECT and not self._warned:
                self._warned = True
                log.warning("%s only: perhaps the server applies a sigmoid, which it does not say; if so, %s", how, fix)


def _check_tokens(inputs: Sequence[Input], answer: Any) -> None:
    """Raises RefusedText if the server says that it read another number of tokens than it got."""
    usage = answer.get("usage") if isinstance(answer, Mapping) else None
    read = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
    sent = sum(len(each) for each in inputs if isinstance(each, list))
    if isinstance(inputs[0], list) and isinstance(read, int) and read and read != sent:
        raise RefusedText(f"the server read {read} tokens, not the {sent} of the text; it truncates or adds tokens")


def _joined(
    encoded: Sequence[_Encoded], batches: Sequence[Batch], found: Sequence[list[float | Exception]]
) -> list[list[Any] | Exception]:
    """The rewards of each group, from those of the requests. found: of each request."""
    by_place: dict[int, float | Exception] = {}
    for batch, rewards in zip(batches, found, strict=True):
        by_place.update(zip(batch.places, rewards, strict=True))
    results: list[list[Any] | Exception] = []
    place = 0
    for each in encoded:
        if isinstance(each, Exception):
            results.append(each)
            continue
        rewards = [by_place[number] for number in range(place, place + len(each))]
        place += len(each)
        bad = next((reward for reward in rewards if isinstance(reward, Exception)), None)
        results.append(bad or find_bad_reward(rewards) or rewards)
    return results


def _cancel(futures: Sequence[Future[Any]]) -> None:
    for future in futures:
        future.cancel()


def _key(given: str | None) -> str | None:
    """The API key of an argument or of the environment."""
    key = given or os.environ.get(KEY_VARIABLE) or None
    if key is not None:
        if not re.fullmatch(r"[!-~]+", key):
            raise UserError(f"the API key (api_key= or {KEY_VARIABLE}) has spaces or characters other than ASCII")
        register_secret(key)
    return key


def _make(settings: dict[str, Any]) -> RemoteScorer:
    """A copy of a scorer that was pickled."""
    return RemoteScorer(**settings)
