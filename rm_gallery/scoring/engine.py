"""The engine: groups -> tokens -> packs -> rewards, with one model on one device.

A group that exceeds the token budget is split into several parts, each with the common prefix.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from rm_gallery.data.batching.bin_packing import Packer
from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.data.batching.prompt_sharing import split_responses
from rm_gallery.data.token_cache.arrays import GroupSizes
from rm_gallery.data.tokenization.encoder import Encoder
from rm_gallery.data.tokenization.token_group import TokenGroup, split_prefix
from rm_gallery.data.tokenization.tokenizer import TokenizeConfig
from rm_gallery.errors import BadRow, UserError
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring import forks
from rm_gallery.scoring.inputs import check_group
from rm_gallery.scoring.loading import ScoringModel, no_statistics

log = logging.getLogger(__name__)

_GROUPS_PER_CALL = 512  # of the tokenizer
_CUDA_TOKENS, _CPU_TOKENS = 16384, 4096  # default token budgets

Encoded: TypeAlias = list[TokenGroup] | Exception
"""The parts of one group, in the order of its responses, or why it cannot be scored."""


def default_budget(device: torch.device) -> int:
    """Maximum tokens of a pack on this kind of device."""
    return _CUDA_TOKENS if device.type == "cuda" else _CPU_TOKENS


def check_weights(model: torch.nn.Module) -> None:
    """Raise UserError for a model with weights that are not finite: its rewards would not be numbers."""
    limits = {
        name.removeprefix("network."): torch.stack(torch.aminmax(weight.detach())).float()
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and weight.numel()
    }
    if not limits:
        return
    is_finite = torch.stack([each.to("cpu") for each in limits.values()]).isfinite().all(dim=1).tolist()
    bad = [name for name, finite in zip(limits, is_finite, strict=True) if not finite]
    if bad:
        config = getattr(getattr(model, "network", None), "config", None)
        path = getattr(config, "_name_or_path", "")
        raise UserError(
            f"{f'model={path}' if path else 'the model'}: {len(bad)} of {len(limits)} weights have values that are not "
            f"finite (first: {bad[0]}); choose another checkpoint"
        )


class NonFiniteReward(BadRow):
    """A row with a reward that is not a finite number."""


def find_bad_reward(rewards: Sequence[float]) -> BadRow | None:
    """Why these rewards of one row cannot be used; None if all are finite."""
    return None if all(map(math.isfinite, rewards)) else NonFiniteReward("reward that is not finite")


def _statistics(source: ScoringModel) -> tuple[float, float]:
    if source.statistics is None:
        raise no_statistics(getattr(source.model.network.config, "_name_or_path", ""))
    return source.statistics


class Engine(forks.SurvivesFork):
    """Tokenizes groups and computes rewards of packs. Thread-safe; model calls run one at a time."""

    def __init__(self, source: ScoringModel, *, token_budget: int | None = None, normalize: bool = False) -> None:
        """token_budget: maximum tokens of a pack, except for a single longer text; None depends on the device.

        normalize: subtract the mean of the validation rewards and divide by their standard deviation. Raises UserError
        for a model without them.
        """
        self.source = source
        self._mean, self._std = _statistics(source) if normalize else (0.0, 1.0)
        self.model, self.tokenizer, self.record = source.model, source.tokenizer, source.record
        check_weights(self.model)
        self.device = next(self.model.parameters()).device
        self.packer = Packer(token_budget or default_budget(self.device), padded=self.model.padded)
        self.num_packs = 0
        """Model calls so far."""
        self._process = os.getpid()
        self._lock = threading.RLock()
        # Fast tokenizers are not thread-safe: concurrent calls raise "Already borrowed".
        self._tokenizer_lock = threading.RLock()
        self._warned_of_length = False
        self._encoder = Encoder(
            self.tokenizer,
            TokenizeConfig(
                max_length=self.record.max_length,
                append_eos=self.record.append_eos,
                text_special_tokens=self.record.text_special_tokens,
                filter_overlong_prompts=False,  # every length is scored
            ),
        )

        forks.watch(self)

    def fork_locks(self) -> Sequence[Any]:
        return self._lock, self._tokenizer_lock

    def encode(self, groups: Sequence[PreferenceGroup]) -> list[Encoded]:
        """Tokens of each group, or the exception that says why it has none; a bad group does not affect others."""
        found: list[Encoded] = []
        for start in range(0, len(groups), _GROUPS_PER_CALL):
            chunk = groups[start : start + _GROUPS_PER_CALL]
            try:
                texts = self._tokenize(chunk)
            except Exception:  # tokenize one by one to find the bad group
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
        if longest > self.record.max_length and not self._warned_of_length:
            self._warned_of_length = True
            log.warning(
                "a text has %d tokens, more than the max_length of training (%d); it is scored without truncation, "
                "and so are all others",
                longest,
                self.record.max_length,
            )
        try:
            return split_responses(split_prefix(texts, ()), self.packer)
        except BadRow as error:
            return error

    def plan(self, parts: Sequence[TokenGroup]) -> list[list[int]]:
        """Packs as indices of parts, within the token budget; parts of similar length share a pack."""
        return self.packer.pack_by_length(GroupSizes.from_rows(part.sizes() for part in parts))

    def run(self, pack: Sequence[TokenGroup]) -> list[list[float]]:
        """Rewards of the responses of each part, from one model call.

        When the device is out of memory, each part is run in its own call.
        """
        try:
            return self._run(pack)
        except torch.OutOfMemoryError:
            if len(pack) == 1:
                raise
        torch.cuda.empty_cache()
        log.warning("out of memory with a pack of %d groups; running them one at a time; lower token_budget", len(pack))
        return [rewards for part in pack for rewards in self._run([part])]

    def _run(self, pack: Sequence[TokenGroup]) -> list[list[float]]:
        if self.device.type == "cuda" and os.getpid() != self._process:
            raise UserError(
                "the model is on a GPU, which a forked process cannot use: load it in this process, with "
                "RewardScorer.from_folder, or start processes with the method 'spawn'"
            )
        with self._lock, torch.inference_mode():
            forks.compute_in_fork()
            self.num_packs += 1
            rewards = self.model(collate(pack).to(self.device)).tolist()
            flat = ((reward - self._mean) / self._std for reward in rewards)
        return [[next(flat) for _ in part.tails] for part in pack]
