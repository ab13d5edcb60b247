"""RewardScorer: rewards from a checkpoint folder, with the tokenization, packing and attention of training."""

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
    """Scores responses with a trained model; the prompt of several responses is computed once.

    A reward depends only on its own text, not on the other texts of the call or their order. Thread-safe. The async
    methods return the same rewards; concurrent calls share forward passes.
    """

    def __init__(self, source: ScoringModel, *, token_budget: int | None = None) -> None:
        """source: from `load_folder`. token_budget: maximum tokens of a model call; None depends on the device."""
        self.folder = ""
        """Folder of the model; identifies the scorer when grading resumes."""
        self.engine = Engine(source, token_budget=token_budget)
        self.inputs = InputBuilder(source.record.input_style, source.record.separator)
        self._batcher = Batcher(self.engine)
        # Runs when this scorer is garbage-collected, and before threads end at interpreter exit.
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
        """Load a checkpoint folder of RM-Gallery, or any sequence classification model with one label.

        device: `auto` uses a GPU if there is one. dtype: `auto` is bfloat16 on a GPU that supports it, else float32;
        the reward head of packed architectures stays float32. On a CPU, freed memory is kept for the next call (see
        `keep_freed_memory`).
        Raises UserError for a folder without such a model.
        """
        source = load_folder(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        scorer = cls(source, token_budget=token_budget)
        scorer.folder = str(folder)
        return scorer

    @property
    def record(self) -> InputRecord:
        """The input format of training."""
        return self.engine.record

    def build_group(self, query: Text | None, responses: Sequence[Text]) -> PreferenceGroup:
        """A query with responses, each text or messages, in the style that the model was trained on.

        For a text model, query and response are joined by the separator of training (by default a blank line), which
        is logged once.
        """
        return self.inputs.group(query, responses)

    def score(self, groups: Sequence[PreferenceGroup]) -> Rewards:
        """One list of K rewards per group, in the order of its responses.

        Raises UserError for a text without tokens, with more tokens than the model has positions, and for a
        conversation that the chat template rejects.
        """
        encoded = self.engine.encode([self.inputs.fit(group) for group in groups])
        for index, units in enumerate(encoded):
            if isinstance(units, Exception):
                raise describe(units, index, groups[index])
        return [rewards for rewards in self._run(encoded) if not isinstance(rewards, Exception)]

    def score_each(self, groups: Sequence[PreferenceGroup]) -> list[list[float] | Exception]:
        """Like `score`, with an exception in place of the rewards of a group that cannot be scored."""
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

        A pair is (chosen, rejected), or a mapping with these keys and optionally `prompt`: a row of training data.
        """
        return _as_pairs(self.score([self.inputs.pair(pair) for pair in pairs]))

    def score_messages(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        """The reward of the last turn of each conversation."""
        return _firsts(self.score([self.inputs.conversation(messages) for messages in conversations]))

    async def ascore(self, groups: Sequence[PreferenceGroup]) -> Rewards:
        """Like `score`; concurrent calls from any tasks, event loops and threads share forward passes.

        Raises RuntimeError after `close`.
        """
        return await asyncio.wrap_future(self._batcher.submit([self.inputs.fit(group) for group in groups]))

    async def ascore_pairs(self, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
        """Async `score_pairs`; see `ascore`."""
        return _as_pairs(await self.ascore([self.inputs.pair(pair) for pair in pairs]))

    async def ascore_messages(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        """Async `score_messages`; see `ascore`."""
        return _firsts(await self.ascore([self.inputs.conversation(messages) for messages in conversations]))

    def close(self) -> None:
        """Stop the worker thread of the async methods, if it runs; other methods still work. Idempotent."""
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
