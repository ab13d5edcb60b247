"""RewardScorer: rewards from a checkpoint folder, with the tokens, packs and attention of training."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

from rm_gallery.modeling.export import InputRecord
from rm_gallery.schema import Message, PreferenceGroup
from rm_gallery.scoring.batcher import Batcher, Rewards, describe
from rm_gallery.scoring.engine import Encoded, Engine
from rm_gallery.scoring.inputs import InputBuilder, Pair, Text
from rm_gallery.scoring.loading import ScoringModel, load_folder


class RewardScorer:
    """Scores responses with a trained model; the responses of one prompt compute the prompt once.

    A reward depends on its own text alone: not on the call, the batch or the order that it comes in. May be used
    from many threads. The async methods give the same rewards; calls that wait at the same time share packs.
    """

    def __init__(self, source: ScoringModel, *, token_budget: int | None = None) -> None:
        """source: from `load_folder`. token_budget: most tokens of one model call; None chooses by device."""
        self.folder = ""
        """Where the model came from; tells one scorer from another when grading is resumed."""
        self.engine = Engine(source, token_budget=token_budget)
        self.inputs = InputBuilder(source.record.input_style, source.record.separator)
        self._batcher = Batcher(self.engine)
        # Runs when this scorer is collected, and before Python takes threads down at its end.
        self._finalizer = weakref.finalize(self, self._batcher.close)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        device: str = "auto",
        dtype: Literal["auto", "fp32", "bf16"] = "auto",
        token_budget: int | None = None,
        trust_remote_code: bool = False,
    ) -> RewardScorer:
        """Load a checkpoint folder: ours, or any sequence classification model with one label.

        device: `auto` takes a GPU when there is one. dtype: `auto` is bfloat16 on a GPU that has it, else float32;
        the reward head of our own architectures stays float32. On a CPU the process keeps memory that it frees, for
        the next call (see `keep_freed_memory`).
        Raises UserError for a folder that holds no such model.
        """
        source = load_folder(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        scorer = cls(source, token_budget=token_budget)
        scorer.folder = str(folder)
        return scorer

    @property
    def record(self) -> InputRecord:
        """How the model was given its texts in training."""
        return self.engine.record

    def build_group(self, query: Text | None, responses: Sequence[Text]) -> PreferenceGroup:
        """A query with responses, each text or messages, as the model was trained to read them.

        A model of bare text gets query and response joined by a blank line, and says so once in the log.
        """
        return self.inputs.group(query, responses)

    def score(self, groups: Sequence[PreferenceGroup]) -> Rewards:
        """One list of K rewards per group, in the order of its responses.

        Raises UserError for a text without tokens or with more than the model has positions for, and for a
        conversation that the chat template refuses.
        """
        encoded = self.engine.encode([self.inputs.fit(group) for group in groups])
        for index, units in enumerate(encoded):
            if isinstance(units, Exception):
                raise describe(units, index, groups[index])
        return [rewards for rewards in self._run(encoded) if not isinstance(rewards, Exception)]

    def score_each(self, groups: Sequence[PreferenceGroup]) -> list[list[float] | Exception]:
        """Like `score`, but a group that cannot be scored has the exception that says why in its place."""
        return self._run(self.engine.encode([self.inputs.fit(group) for group in groups]))

    def _run(self, encoded: Sequence[Encoded]) -> list[list[float] | Exception]:
        parts = [part for each in encoded if not isinstance(each, Exception) for part in each]
        found: list[list[float]] = [[]] * len(parts)
        for pack in self.engine.plan(parts):
            for index, rewards in zip(pack, self.engine.run([parts[index] for index in pack]), strict=True):
                found[index] = rewards
        ordered = iter(found)
        return [
            each if isinstance(each, Exception) else [reward for _ in each for reward in next(ordered)]
            for each in encoded
        ]

    def score_pairs(self, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
        """(chosen reward, rejected reward) of each pair.

        A pair is (chosen, rejected), or a mapping with these keys and perhaps `prompt`: a row of training data.
        """
        return _as_pairs(self.score([self.inputs.pair(pair) for pair in pairs]))

    def score_messages(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        """The reward of the last turn of each conversation."""
        return _firsts(self.score([self.inputs.conversation(messages) for messages in conversations]))

    async def ascore(self, groups: Sequence[PreferenceGroup]) -> Rewards:
        """Like `score`; calls from any tasks, event loops and threads that wait at the same time share packs.

        Raises RuntimeError after `close`.
        """
        return await asyncio.wrap_future(self._batcher.submit([self.inputs.fit(group) for group in groups]))

    async def ascore_pairs(self, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
        """Like `score_pairs`, as `ascore` does it."""
        return _as_pairs(await self.ascore([self.inputs.pair(pair) for pair in pairs]))

    async def ascore_messages(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        """Like `score_messages`, as `ascore` does it."""
        return _firsts(await self.ascore([self.inputs.conversation(messages) for messages in conversations]))

    def close(self) -> None:
        """End the thread behind the async methods, if there is one; the others still work. May be called again."""
        self._finalizer()

    def __enter__(self) -> RewardScorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _as_pairs(rewards: Rewards) -> list[tuple[float, float]]:
    return [(chosen, rejected) for chosen, rejected in rewards]


def _firsts(rewards: Rewards) -> list[float]:
    return [first for (first,) in rewards]
