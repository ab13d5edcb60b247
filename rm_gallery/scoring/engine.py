"""The engine: groups -> tokens -> packs -> rewards. One model, used by one thread at a time.

A group with more responses than fit into a pack is cut into several units; each repeats the common prefix.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.data.tokenization.encoder import Encoder
from rm_gallery.data.tokenization.token_group import TokenGroup, split_prefix
from rm_gallery.data.tokenization.tokenizer import TokenizeConfig
from rm_gallery.errors import BadRow
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring.inputs import check_group
from rm_gallery.scoring.loading import ScoringModel

log = logging.getLogger(__name__)

_GROUPS_AT_ONCE = 512  # tokenized in one call


@dataclass(frozen=True, slots=True)
class Unit:
    """Responses of one group that go into a pack together."""

    tokens: TokenGroup
    first: int
    """Number of its first response in the group."""

    @property
    def num_responses(self) -> int:
        return len(self.tokens.tails)

    @property
    def longest(self) -> int:
        """Tokens of the longest whole text."""
        return len(self.tokens.prefix) + max(len(tail) for tail in self.tokens.tails)

    def cost(self, padded: bool) -> int:
        """Tokens that the model computes for it; those of padding included, for a model that pads."""
        if padded:
            return self.longest * self.num_responses
        return len(self.tokens.prefix) + sum(len(tail) for tail in self.tokens.tails)


Encoded: TypeAlias = list[Unit] | Exception
"""Units of one group, or why it cannot be scored."""


class Engine:
    """Turns groups into units and packs of units into rewards; both may be called from any thread."""

    def __init__(self, source: ScoringModel, *, token_budget: int | None = None) -> None:
        """token_budget: most tokens of a pack, but for a single text that is longer; None chooses by device."""
        self.source = source
        self.model, self.tokenizer, self.record = source.model, source.tokenizer, source.record
        self.device = next(self.model.parameters()).device
        self.token_budget = token_budget or (16384 if self.device.type == "cuda" else 4096)
        self.num_packs = 0
        """Model calls so far."""
        self._lock = threading.Lock()
        # Tokenizers are not safe: two threads that use one get "Already borrowed" from it.
        self._tokenizer_lock = threading.Lock()
        self._said_long = False
        self._encoder = Encoder(
            self.tokenizer,
            TokenizeConfig(
                max_length=self.record.max_length,
                append_eos=self.record.append_eos,
                text_special_tokens=self.record.text_special_tokens,
            ),
        )

    def encode(self, groups: Sequence[PreferenceGroup]) -> list[Encoded]:
        """Tokens of each group, or the exception that says why it has none; one bad group harms no other."""
        found: list[Encoded] = []
        for start in range(0, len(groups), _GROUPS_AT_ONCE):
            chunk = groups[start : start + _GROUPS_AT_ONCE]
            try:
                texts = self._tokenize(chunk)
            except Exception:  # one of them: find out which, one by one
                found += [self._encode_one(group) for group in chunk]
            else:
                found += [self._split(each) for each in texts]
        return found

    def _encode_one(self, group: PreferenceGroup) -> Encoded:
        try:
            texts = self._tokenize([group])
        except Exception as error:
            return error
        return self._split(texts[0])

    def _tokenize(self, groups: Sequence[PreferenceGroup]) -> list[list[list[int]] | BadRow]:
        for group in groups:
            check_group(group)
        with self._tokenizer_lock:
            texts = self._encoder.encode_many(groups)
        closing = list(self.source.closing_ids)
        if not closing:
            return texts
        return [each if isinstance(each, BadRow) else [ids + closing for ids in each] for each in texts]

    def _split(self, texts: list[list[int]] | BadRow) -> Encoded:
        if isinstance(texts, BadRow):
            return texts
        if not texts:
            return []
        longest = max(map(len, texts))
        limit = self.source.positions
        if limit is not None and longest > limit:
            return BadRow(f"longer than the {limit} tokens that the model has positions for")
        self._warn_of_length(longest)
        try:
            whole = split_prefix(texts, ())
        except BadRow as error:
            return error
        units, start = [], 0
        while start < len(texts):
            count = self._fitting(whole, start)
            tails = whole.tails[start : start + count]
            units.append(Unit(TokenGroup(whole.prefix, tails, ()), start))
            start += count
        return units

    def _fitting(self, group: TokenGroup, start: int) -> int:
        """How many responses from `start` on fit into one pack; at least one."""
        used = longest = count = 0
        for tail in group.tails[start:]:
            longest = max(longest, len(group.prefix) + len(tail))
            used += len(tail)
            cost = longest * (count + 1) if self.model.padded else len(group.prefix) + used
            if count and cost > self.token_budget:
                break
            count += 1
        return count

    def _warn_of_length(self, longest: int) -> None:
        if longest > self.record.max_length and not self._said_long:
            self._said_long = True
            log.warning(
                "a text of %d tokens is longer than any in training (%d); it is scored whole, and so are more like it",
                longest,
                self.record.max_length,
            )

    def plan(self, units: Sequence[Unit]) -> list[list[int]]:
        """Packs of units, as indices: those of like length together, since padding inside a pack costs time."""
        padded = self.model.padded
        packs: list[list[int]] = []
        used = 0
        for index in sorted(range(len(units)), key=lambda index: -units[index].longest):
            if padded and packs:  # each text of a pack costs what its longest does, which came first
                cost = units[packs[-1][0]].longest * units[index].num_responses
            else:
                cost = units[index].cost(padded)
            if not packs or used + cost > self.token_budget:
                packs.append([])
                used, cost = 0, units[index].cost(padded)
            packs[-1].append(index)
            used += cost
        return packs

    def run(self, pack: Sequence[Unit]) -> list[list[float]]:
        """Rewards of the responses of each unit, from one model call.

        When the device has too little memory, each unit has a call of its own.
        """
        try:
            return self._run(pack)
        except torch.OutOfMemoryError:
            if len(pack) == 1:
                raise
        torch.cuda.empty_cache()
        log.warning("a pack of %d groups does not fit into memory; set a lower token_budget", len(pack))
        return [rewards for unit in pack for rewards in self._run([unit])]

    def _run(self, pack: Sequence[Unit]) -> list[list[float]]:
        batch = collate([unit.tokens for unit in pack])
        with self._lock, torch.inference_mode():
            self.num_packs += 1
            flat = self.model(batch.to(self.device)).tolist()
        rewards = []
        for unit in pack:
            rewards.append(flat[: unit.num_responses])
            flat = flat[unit.num_responses :]
        return rewards
