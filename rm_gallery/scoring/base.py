"""What all scorers have in common: the forms of their inputs, the methods built on `score`, and errors of single rows.

Does not load torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar

from rm_gallery.errors import BadRow, UserError
from rm_gallery.schema import Message, PreferenceGroup
from rm_gallery.scoring.inputs import InputBuilder, Pair, Text, Tools, spread_tools

Rewards: TypeAlias = list[list[float]]


class BaseScorer(ABC):
    """Scores responses. Rewards do not depend on the other texts of a call or their order."""

    inputs: InputBuilder
    folder: str
    """What was loaded; identifies the scorer when grading resumes."""
    attributes: tuple[str, ...] = ()
    """Names of further numbers of each response; () for a scorer of one reward."""

    @abstractmethod
    def score(self, groups: Sequence[PreferenceGroup]) -> Rewards:
        """One list of K rewards per group, in the order of its responses. Raises UserError for one without a reward."""

    @abstractmethod
    def score_each(self, groups: Sequence[PreferenceGroup], *, attributes: bool = False) -> list[list[Any] | Exception]:
        """Like `score`, with an exception in place of the rewards of a group that cannot be scored.

        attributes: in place of each reward a list of it and the numbers that `attributes` names, if it names any.
        """

    @abstractmethod
    async def ascore(self, groups: Sequence[PreferenceGroup]) -> Rewards:
        """Async `score`."""

    @abstractmethod
    def close(self) -> None:
        """Free what the scorer holds. Idempotent."""

    def score_attributes(self, groups: Sequence[PreferenceGroup]) -> list[list[dict[str, float]]]:
        """Like `score`, with `reward` and every attribute by its name, for each response."""
        groups = self.fitted(groups)
        found = raise_first(self.score_each(groups, attributes=True), groups)
        names = ("reward", *self.attributes)
        return [
            [dict(zip(names, each if self.attributes else [each], strict=True)) for each in group] for group in found
        ]

    def build_group(self, query: Text | None, responses: Sequence[Text], tools: Tools | None = None) -> PreferenceGroup:
        """A query with responses, each text or messages, in the style that the model was trained on.

        tools: tool definitions for the chat template, or their JSON text. For a text model, query and response are
        joined by the separator of training (by default a blank line), which is logged once.
        """
        return self.inputs.group(query, responses, tools)

    def score_pairs(
        self, pairs: Sequence[Pair], tools: Tools | Sequence[Tools | None] | None = None
    ) -> list[tuple[float, float]]:
        """(chosen reward, rejected reward) of each pair.

        A pair is (chosen, rejected), or a mapping with these keys and optionally `prompt` and `tools`: a row of
        training data. tools: one list of tool definitions for all pairs, or one per pair, for pairs without their own.
        """
        return _as_pairs(self.score(self._pairs(pairs, tools)))

    def score_messages(
        self, conversations: Sequence[Sequence[Message]], tools: Tools | Sequence[Tools | None] | None = None
    ) -> list[float]:
        """The reward of the last turn of each conversation.

        tools: one list of tool definitions for all conversations, or one per conversation (None for none).
        """
        return _firsts(self.score(self._conversations(conversations, tools)))

    async def ascore_pairs(
        self, pairs: Sequence[Pair], tools: Tools | Sequence[Tools | None] | None = None
    ) -> list[tuple[float, float]]:
        """Async `score_pairs`; see `ascore`."""
        return _as_pairs(await self.ascore(self._pairs(pairs, tools)))

    async def ascore_messages(
        self, conversations: Sequence[Sequence[Message]], tools: Tools | Sequence[Tools | None] | None = None
    ) -> list[float]:
        """Async `score_messages`; see `ascore`."""
        return _firsts(await self.ascore(self._conversations(conversations, tools)))

    def _pairs(self, pairs: Any, tools: Any) -> list[PreferenceGroup]:
        if isinstance(pairs, str | Mapping) or (isinstance(pairs, tuple) and pairs and isinstance(pairs[0], str)):
            raise UserError("score_pairs takes a list of pairs; for one pair, score_pairs([pair])")
        pairs = list(pairs)
        spread = spread_tools(tools, len(pairs), "pair")
        return [self.inputs.pair(pair, own) for pair, own in zip(pairs, spread, strict=True)]

    def _conversations(self, conversations: Any, tools: Any) -> list[PreferenceGroup]:
        conversations = [conversations] if isinstance(conversations, str | Mapping) else list(conversations)
        wrong = next((each for each in conversations if isinstance(each, str | Mapping | PreferenceGroup)), None)
        if wrong is not None:
            what = "text" if isinstance(wrong, str) else "one message" if isinstance(wrong, Mapping) else "a group"
            raise UserError(
                f"score_messages takes a list of conversations, each a list of messages, not {what}; for one "
                'conversation, score_messages([[{"role": "user", "content": ...}, ...]])'
            )
        spread = spread_tools(tools, len(conversations), "conversation")
        return [self.inputs.conversation(each, own) for each, own in zip(conversations, spread, strict=True)]

    def fitted(self, groups: Any) -> list[PreferenceGroup]:
        """The groups of a call in the style of this model. Raises UserError, with the right call, for other values."""
        is_one = isinstance(groups, PreferenceGroup | str | Mapping) or not isinstance(groups, Iterable)
        items: list[Any] = [groups] if is_one else list(groups)
        for item in items:
            if not isinstance(item, PreferenceGroup):
                raise UserError(
                    f"score takes a list of PreferenceGroup, not {type(item).__name__}: build one with "
                    'scorer.build_group(query, responses), e.g. score([scorer.build_group("Why?", ["Because."])]), or '
                    "call score_messages([messages]) or score_pairs([(chosen, rejected)])"
                )
        if items and items[0] is groups:
            raise UserError("score takes a list of groups; for one group, score([group])")
        return [self.inputs.fit(group) for group in items]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class NonFiniteReward(BadRow):
    """A row with a reward that is not a finite number."""


def find_bad_reward(rewards: Sequence[Any]) -> BadRow | None:
    """Why these rewards of one row cannot be used; None if all are finite."""
    values = [value for each in rewards for value in (each if isinstance(each, list) else [each])]
    return None if all(map(math.isfinite, values)) else NonFiniteReward("reward that is not finite")


def describe(error: Exception, index: int, group: PreferenceGroup) -> Exception:
    """The error of one group of a call with the group's place; errors other than ValueError are returned unchanged."""
    if not isinstance(error, ValueError):
        return error
    place = group.where or f"group {index}"
    described = UserError(f"{place}: the text cannot be scored: {error}")
    described.__cause__ = error
    return described


T = TypeVar("T")


def raise_first(results: Sequence[T | Exception], groups: Sequence[PreferenceGroup]) -> list[T]:
    """The results. Raises the first exception among them, with the place of its group."""
    found: list[T] = []
    for index, each in enumerate(results):
        if isinstance(each, Exception):
            raise describe(each, index, groups[index])
        found.append(each)
    return found


def _as_pairs(rewards: Rewards) -> list[tuple[float, float]]:
    return [(chosen, rejected) for chosen, rejected in rewards]


def _firsts(rewards: Rewards) -> list[float]:
    return [first for (first,) in rewards]
