"""The engine: groups -> tokens -> packs -> rewards, with one model on one device.

A group that exceeds the token budget is split into several parts, each with the common prefix.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rm_gallery.data.batching.bin_packing import Packer
from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.data.batching.prompt_sharing import split_responses
from rm_gallery.data.token_cache.arrays import GroupSizes
from rm_gallery.data.tokenization.encoder import Encoder
from rm_gallery.data.tokenization.token_group import TokenGroup, split_prefix
from rm_gallery.data.tokenization.tokenizer import TokenizeConfig
from rm_gallery.errors import BadRow, UserError
from rm_gallery.modeling.attention.past import PastKeys
from rm_gallery.modeling.config import head_names, weights_of
from rm_gallery.modeling.export import InputRecord
from rm_gallery.modeling.forward import weighted_sum
from rm_gallery.modeling.reward_model import RewardModel
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


def find_weights(record: InputRecord, weights: Mapping[str, float] | None) -> tuple[float, ...]:
    """The weight of each attribute of a model in its reward; () for a model without attributes.

    weights: by name, instead of those of the record. Raises UserError for names that the model does not have.
    """
    if weights is None:
        return tuple(record.attribute_weights)
    names = list(record.attributes)
    if not names:
        raise UserError("weights are for models with attributes, and this model has one reward; remove them")
    if unknown := [name for name in weights if name not in names]:
        raise UserError(f"weights: the model has no attribute {unknown[0]!r}; it has {', '.join(names)}")
    if not any(weights.values()) or not all(map(math.isfinite, weights.values())):
        raise UserError(f"weights={dict(weights)}: must be finite, and not all 0")
    return weights_of(names, weights)


def columns_of(record: InputRecord) -> tuple[str, ...]:
    """Names of the numbers beside the reward: the outputs of a model, and of several heads their standard deviation."""
    is_heads = bool(record.attributes) and list(record.attributes) == head_names(len(record.attributes))
    return (*record.attributes, "std") if is_heads else tuple(record.attributes)


def _statistics(source: ScoringModel) -> tuple[float, float]:
    if source.statistics is None:
        raise no_statistics(getattr(source.model.network.config, "_name_or_path", ""))
    return source.statistics


class Engine(forks.SurvivesFork):
    """Tokenizes groups and computes rewards of packs. Thread-safe; model calls run one at a time."""

    def __init__(
        self, source: ScoringModel, *, token_budget: int | None = None, normalize: bool = False,
        weights: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        """token_budget: maximum tokens of a pack, except for a single longer text; None depends on the device.

        normalize: subtract the mean of the validation rewards and divide by their standard deviation. weights: of the
        model's attributes in the reward, instead of those of its folder. Raises UserError for a model without them.
        """
        self.source = source
        self.weights = find_weights(source.record, weights)
        if normalize and self.weights != tuple(source.record.attribute_weights):
            raise UserError("weights with normalize: mean and standard deviation are those of the folder's own weights")
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
        return [each if isinstance(each, Exception) else self._split(each) for each in self.tokenize(groups)]

    def tokenize(self, groups: Sequence[PreferenceGroup]) -> list[list[list[int]] | Exception]:
        """Token ids of every whole text as `[group][response]`, or in place of a group why it has none."""
        found: list[list[list[int]] | Exception] = []
        for start in range(0, len(groups), _GROUPS_PER_CALL):
            chunk = groups[start : start + _GROUPS_PER_CALL]
            try:
                texts = self._tokenize(chunk)
            except Exception:  # tokenize one by one to find the bad group
                found += [self._tokenize_one(group) for group in chunk]
            else:
                found += [self._checked(each) for each in texts]
        return found

    def response_starts(self, texts: Sequence[list[int]], group: PreferenceGroup) -> list[int | None]:
        """The first token of the response in each whole text of a group; None where it is not found exactly."""
        closing = len(self.source.closing_ids)
        with self._tokenizer_lock:
            return self._encoder.response_starts([ids[: len(ids) - closing] for ids in texts], group)

    def tokenize_rendered(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts in which all special tokens are written out."""
        with self._tokenizer_lock:
            found = self._encoder.encode_rendered(texts)
        closing = list(self.source.closing_ids)
        return [ids if ids[len(ids) - len(closing) :] == closing else ids + closing for ids in found]

    def encode_rendered(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokens of each such text, or the exception that says why it has none."""
        found: list[Encoded] = []
        for text in texts:
            try:
                ids = self._checked(self.tokenize_rendered([text]))
            except BadRow as error:
                ids = error
            found.append(ids if isinstance(ids, Exception) else self._split(ids))
        return found

    def _tokenize_one(self, group: PreferenceGroup) -> list[list[int]] | Exception:
        try:
            texts = self._tokenize([group])
        except Exception as error:
            return error
        return self._checked(texts[0])

    def _tokenize(self, groups: Sequence[PreferenceGroup]) -> list[list[list[int]] | BadRow]:
        for group in groups:
            check_group(group)
        with self._tokenizer_lock:
            texts = self._encoder.encode_many(groups)
        closing = list(self.source.closing_ids)
        if not closing:
            return texts
        return [each if isinstance(each, BadRow) else [ids + closing for ids in each] for each in texts]

    def _checked(self, texts: list[list[int]] | BadRow) -> list[list[int]] | BadRow:
        """The texts, unless one is longer than the model has positions for."""
        if isinstance(texts, BadRow) or not texts:
            return texts
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
        return texts

    def _split(self, texts: list[list[int]]) -> Encoded:
        if not texts:
            return []
        try:
            return split_responses(split_prefix(texts, ()), self.packer)
        except BadRow as error:
            return error

    def plan(self, parts: Sequence[TokenGroup]) -> list[list[int]]:
        """Packs as indices of parts, within the token budget; parts of similar length share a pack."""
        return self.packer.pack_by_length(GroupSizes.from_rows(part.sizes() for part in parts))

    def run(
        self, pack: Sequence[TokenGroup], *, attributes: bool = False, past: PastKeys | None = None
    ) -> list[list[Any]]:
        """Rewards of the responses of each part, from one model call.

        attributes: in place of each reward a list of it and the attributes of the model. past: keys and values of the
        parts' prefixes that are known. When the device is out of memory, each part is run in its own call without them.
        """
        try:
            return self._run(pack, attributes, past)
        except torch.OutOfMemoryError:
            if len(pack) == 1 and past is None:
                raise
        torch.cuda.empty_cache()
        log.warning("out of memory with a pack of %d groups; running them one at a time; lower token_budget", len(pack))
        return [rewards for part in pack for rewards in self._run([part], attributes)]

    def _columns(self, outputs: Tensor) -> Tensor:
        """[R, columns] as `columns_of` names them, from outputs [R, A]."""
        if len(columns_of(self.record)) <= outputs.shape[1]:
            return outputs
        return torch.cat([outputs, outputs.std(dim=1, correction=0, keepdim=True)], dim=1)

    def run_tokens(self, pack: Sequence[TokenGroup]) -> list[list[list[float]]]:
        """The reward read at every token of each whole text, from one model call: that of the text up to the token.

        The last one is the reward of the text. For models with `has_token_rewards`.
        """
        self._check_process()
        model = self.model
        assert isinstance(model, RewardModel) and not model.padded
        batch = collate(pack)
        with self._lock, torch.inference_mode():
            forks.compute_in_fork()
            self.num_packs += 1
            rewards = weighted_sum(model.token_rewards(batch.to(self.device)), self.weights).tolist()
        values = [(reward - self._mean) / self._std for reward in rewards]
        found, start = [], 0
        for part in pack:
            prefix, start = values[start : start + len(part.prefix)], start + len(part.prefix)
            texts = []
            for tail in part.tails:
                texts.append(prefix + values[start : start + len(tail)])
                start += len(tail)
            found.append(texts)
        return found

    @property
    def has_token_rewards(self) -> bool:
        """Whether `run_tokens` reads rewards of single tokens: of decoders that run packed."""
        return isinstance(self.model, RewardModel) and not self.model.padded

    def _check_process(self) -> None:
        if self.device.type == "cuda" and os.getpid() != self._process:
            raise UserError(
                "the model is on a GPU, which a forked process cannot use: load it in this process, with "
                "RewardScorer.from_folder, or start processes with the method 'spawn'"
            )

    def _run(self, pack: Sequence[TokenGroup], attributes: bool, past: PastKeys | None = None) -> list[list[Any]]:
        self._check_process()
        with self._lock, torch.inference_mode():
            forks.compute_in_fork()
            self.num_packs += 1
            batch = collate(pack).to(self.device)
            outputs = self.model(batch) if past is None else self.model(batch, past)
            rewards = weighted_sum(outputs, self.weights).tolist()
            found = [(reward - self._mean) / self._std for reward in rewards]
            rows = self._columns(outputs.reshape(len(rewards), -1)).tolist() if attributes else []
            flat = iter([[reward, *row] for reward, row in zip(found, rows, strict=True)] if attributes else found)
        return [[next(flat) for _ in part.tails] for part in pack]
