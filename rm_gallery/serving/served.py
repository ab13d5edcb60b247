"""The models of a server: texts of a request become tokens, tokens go through the queue of each model."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np

from rm_gallery.errors import nearest, one_line
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring.ensemble import Reduction
from rm_gallery.scoring.prefix_cache import PrefixCache
from rm_gallery.scoring.scorer import RewardScorer
from rm_gallery.serving.limits import CHARACTERS_PER_TOKEN, Limits, Refused, bad_request
from rm_gallery.serving.queue import ScoringQueue


@dataclass(frozen=True)
class Conversation:
    """Messages that the model's chat template renders; the last turn is scored, or each of several responses."""

    messages: Any
    responses: Sequence[Any] | None = None
    tools: Any = None


@dataclass(frozen=True)
class RenderedText:
    """A text that a client rendered."""

    text: str
    adds_special_tokens: bool = True
    """Whether the tokenizer adds its special tokens; False if the text has all of them."""


Item: TypeAlias = Conversation | RenderedText | list[int]
"""What a request asks the reward of; a list is token ids."""


@dataclass(frozen=True)
class Truncation:
    """How long texts are cut, which only a client decides."""

    size: int | None = None
    """Tokens that stay; -1 for the maximum length of the model."""
    keeps_end: bool = True


@dataclass(frozen=True)
class Scores:
    """Rewards in the order of the request."""

    rewards: list[float]
    num_tokens: int
    """Of all texts, as the first model of an ensemble reads them."""


_Place: TypeAlias = tuple[str, PreferenceGroup | str | list[int]]
"""The name of a text in messages, and what it is tokenized from."""
_T = TypeVar("_T")
_TEXTS_PER_CALL = 64  # of the tokenizer: fewer start a pack earlier, more cost less


@dataclass(eq=False)
class _Asked:
    """A request that waits for the tokenizer."""

    items: Sequence[Item]
    truncation: Truncation
    texts: Future[list[np.ndarray]] = field(default_factory=Future)

    @property
    def num_texts(self) -> int:
        """Texts that it is for; a response with its prompt is one."""
        return sum(
            len(each.responses) if isinstance(each, Conversation) and each.responses else 1 for each in self.items
        )


class Member:
    """One model: its scorer, its queue, and the thread that tokenizes for it."""

    def __init__(self, scorer: RewardScorer, limits: Limits) -> None:
        self.scorer, self.limits = scorer, limits
        cache = PrefixCache(scorer.engine, limits.prefix_cache_mb) if limits.prefix_cache_mb else None
        self.queue = ScoringQueue(scorer.engine, limits.max_waiting, cache)
        self._tokenizer = ThreadPoolExecutor(1, thread_name_prefix="rm-gallery-tokenizer")
        self._asked: deque[_Asked] = deque()
        network = scorer.engine.model.network
        self._num_ids = int(network.get_input_embeddings().num_embeddings)
        self.max_length = self._find_max_length(network.config.get_text_config())

    def _find_max_length(self, config: Any) -> int:
        """Tokens of the longest text that is accepted."""
        positions, wanted = self.scorer.engine.source.positions, self.limits.max_length
        if wanted is None:
            trained = min(self.scorer.record.max_length, 2**20)
            wanted = max(trained, getattr(config, "max_position_embeddings", None) or 0)
        return wanted if positions is None else min(wanted, positions)

    async def encode(self, items: Sequence[Item], truncation: Truncation) -> list[np.ndarray]:
        """The tokens of each text, [length] int32. Raises Refused for one that cannot be scored, naming it.

        Requests that wait for the tokenizer are tokenized by one call.
        """
        asked = _Asked(items, truncation)
        self._asked.append(asked)
        self._tokenizer.submit(self._encode_waiting)
        return await asyncio.wrap_future(asked.texts)

    def _encode_waiting(self) -> None:
        """Encode requests that wait, if an earlier call has not done so; a large one does not delay those before it."""
        chosen: list[_Asked] = []
        left = _TEXTS_PER_CALL
        while self._asked and (not chosen or self._asked[0].num_texts <= left):
            asked = self._asked.popleft()
            if asked.texts.set_running_or_notify_cancel():
                chosen.append(asked)
                left -= asked.num_texts
        if not chosen:
            return
        found: list[list[_Place] | Exception] = [_caught(self._prepare, each.items) for each in chosen]
        places = [place for each in found if not isinstance(each, Exception) for place in each]
        groups = [what for _, what in places if isinstance(what, PreferenceGroup)]
        texts = _caught(self.scorer.engine.tokenize, groups)
        if isinstance(texts, Exception):
            found, texts = [texts] * len(found), []
        tokenized = iter(texts)
        for asked, each in zip(chosen, found, strict=True):
            texts = each if isinstance(each, Exception) else _caught(self._texts, each, tokenized, asked.truncation)
            if isinstance(texts, Exception):
                asked.texts.set_exception(texts)
            else:
                asked.texts.set_result(texts)

    def _prepare(self, items: Sequence[Item]) -> list[_Place]:
        """What to tokenize, after checks of its size."""
        places: list[_Place] = []
        for number, item in enumerate(items):
            what = f"text {number}"
            if isinstance(item, Conversation):
                places.append((what, self._group(item, what)))
            elif isinstance(item, RenderedText):
                self._check_characters(len(item.text), what)
                group = PreferenceGroup("", [item.text], style="text")
                places.append((what, group if item.adds_special_tokens else item.text))
            else:
                places.append((what, item))
        return places

    def _texts(
        self, places: Sequence[_Place], tokenized: Iterator[list[list[int]] | Exception], truncation: Truncation
    ) -> list[np.ndarray]:
        """The tokens of a request's texts; takes those of its groups from `tokenized`, all of them in any case."""
        known = [next(tokenized) if isinstance(each, PreferenceGroup) else None for _, each in places]
        texts: list[np.ndarray] = []
        for (what, each), found in zip(places, known, strict=True):
            if not isinstance(each, PreferenceGroup):
                found = self._ids(each, what)
            assert found is not None
            if isinstance(found, Exception):
                raise bad_request(f"{what} cannot be scored: {one_line(found)}")
            texts += [self._fitted(ids, what, truncation) for ids in found]
        return texts

    async def run_beside(self, call: Callable[[], _T]) -> _T:
        """The result of a call that uses the tokenizer, in its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizer, call)

    def _group(self, item: Conversation, what: str) -> PreferenceGroup:
        try:
            if item.responses is None:
                group = self.scorer.inputs.conversation(item.messages, item.tools)
            else:
                group = self.scorer.inputs.group(item.messages, item.responses, item.tools)
            shared = _characters(group.prompt)
            longest = max((_characters(response) for response in group.responses), default=0)
        except (ValueError, TypeError, RecursionError) as error:
            raise bad_request(f"{what}: {one_line(error)}") from None
        self._check_characters(shared + longest, what)
        return group

    def _ids(self, text: str | list[int], what: str) -> list[list[int]] | Exception:
        """The tokens of a rendered text, or checked token ids."""
        if isinstance(text, list):
            wrong = next((each for each in text if not 0 <= each < self._num_ids), None)
            if wrong is not None:
                raise bad_request(f"{what} has the token id {wrong}; the model has 0 to {self._num_ids - 1}")
            return [text]
        try:
            return self.scorer.engine.tokenize_rendered([text])
        except ValueError as error:
            return error

    def _check_characters(self, count: int, what: str) -> None:
        limit = CHARACTERS_PER_TOKEN * self.max_length
        if count > limit:
            raise bad_request(
                f"{what} has {count} characters, more than {limit}, which is {CHARACTERS_PER_TOKEN} for each of the "
                f"{self.max_length} tokens of --max-length"
            )

    def _fitted(self, ids: list[int], what: str, truncation: Truncation) -> np.ndarray:
        size = truncation.size
        if size is not None:
            size = self.max_length if size < 0 else size
            ids = ids[-size:] if truncation.keeps_end else ids[:size]
        if not ids:
            raise bad_request(f"{what} has no token")
        if len(ids) > self.max_length:
            raise bad_request(
                f"{what} has {len(ids)} tokens, more than the {self.max_length} of --max-length; shorten it, or set "
                "truncate_prompt_tokens"
            )
        return np.asarray(ids, np.int32)

    def close(self, *, finish: bool) -> None:
        self._tokenizer.shutdown(wait=finish, cancel_futures=not finish)
        for asked in self._asked:
            asked.texts.cancel()
        self.queue.close(finish=finish)
        self.scorer.close()


class ServedModel:
    """A name that requests may have: one model, or an ensemble."""

    def __init__(self, name: str, members: Sequence[Member], reduction: Reduction | None = None) -> None:
        """reduction: how the rewards of several members become one; None for the mean."""
        self.name, self.members, self.reduction = name, list(members), reduction or Reduction("mean")

    @property
    def max_length(self) -> int:
        return min(member.max_length for member in self.members)

    @property
    def is_alive(self) -> bool:
        return all(member.queue.is_alive for member in self.members)

    async def score(
        self, items: Sequence[Item], count: int, client: str, truncation: Truncation | None = None
    ) -> Scores:
        """The rewards of `count` texts. Raises Refused for one that cannot be scored, and for a full queue."""
        encoded, found = await self._compute(items, count, client, truncation or Truncation())
        rewards = found[0] if len(found) == 1 else [reward for reward, _ in self.reduction.of(found)]
        return Scores(rewards, sum(map(len, encoded[0])))

    async def _compute(
        self, items: Sequence[Item], count: int, client: str, truncation: Truncation
    ) -> tuple[list[list[np.ndarray]], list[list[Any]]]:
        """The tokens of the texts and their rewards, of each member."""
        async with Places(self.members, count) as places:  # before texts are tokenized: what waits for that counts too
            encoded = [await member.encode(items, truncation) for member in self.members]
            return encoded, await places.submit(encoded, client)


class Places:
    """Places of `count` texts in the queue of each member, which are free again at the end of a block."""

    def __init__(self, members: Sequence[Member], count: int) -> None:
        self._members, self._count = members, count
        self._reserved: list[ScoringQueue] = []
        self._futures: list[Future[list[Any]]] = []

    async def __aenter__(self) -> Places:
        try:
            for member in self._members:
                member.queue.reserve(self._count)
                self._reserved.append(member.queue)
        except BaseException:
            self._leave()
            raise
        return self

    async def submit(
        self, texts: Sequence[Sequence[np.ndarray]], client: str, *, every_token: bool = False
    ) -> list[list[Any]]:
        """What each member's queue gives for its texts; see `ScoringQueue.submit`."""
        for member, each in zip(self._members, texts, strict=True):
            self._futures.append(member.queue.submit(each, client, every_token=every_token))
            self._reserved.remove(member.queue)
        try:
            return list(await asyncio.gather(*map(asyncio.wrap_future, self._futures)))
        except ValueError as error:
            raise Refused(422, one_line(error)) from None

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        for queue in self._reserved:
            queue.release(self._count)
        for future in self._futures:  # of a client that left, or of the other members of an ensemble
            future.cancel()


class Models:
    """All models of a server, by name."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self.by_name = {model.name: model for model in models}

    def find(self, name: str | None) -> ServedModel:
        """The model of a request, which may be unnamed if there is only one. Raises Refused with status 404."""
        if name is None and len(self.by_name) == 1:
            return next(iter(self.by_name.values()))
        known = ", ".join(self.by_name)
        if name is None:
            raise bad_request(f"the server has several models ({known}); name one", "model")
        if name not in self.by_name:
            shown = re.sub(r"[^ -~]", "?", name[:80])
            raise Refused(404, f"no model {shown!r}; the server has {known}.{nearest(shown, self.by_name)}", "model")
        return self.by_name[name]

    def members(self) -> list[Member]:
        """Each once, also those of several ensembles."""
        return list({id(each): each for model in self.by_name.values() for each in model.members}.values())

    def close(self, *, finish: bool = True) -> None:
        """finish: score what was accepted."""
        for member in self.members():
            member.close(finish=finish)


def _caught(call: Callable[..., Any], *arguments: Any) -> Any:
    """The result, or the exception: that of one request is not that of the others in the same call."""
    try:
        return call(*arguments)
    except Exception as error:
        return error


def _characters(part: Any) -> int:
    """Of a text, or of all strings in messages."""
    if isinstance(part, str):
        return len(part)
    if isinstance(part, dict):
        return sum(map(_characters, part.values()))
    return sum(map(_characters, part)) if isinstance(part, list | tuple) else 0
