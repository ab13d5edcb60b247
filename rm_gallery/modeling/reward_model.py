"""The reward model: a sequence classification model of transformers with one label, called on PackedBatches.

Decoders run on packed tokens with shared prompts. Encoders attend in both directions, so texts cannot share a prompt:
they run on padded texts behind the same interface.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.modeling.architectures import DECODERS, architecture
from rm_gallery.modeling.attention import dispatch
from rm_gallery.modeling.config import AttentionKernel
from rm_gallery.modeling.decoder_layers import adapt
from rm_gallery.modeling.heads import HEADS
from rm_gallery.modeling.model_folder import open_model

log = logging.getLogger(__name__)

# T tokens, R responses, L longest text, D hidden


class RewardModel(nn.Module):
    """A one-label sequence classification model of transformers, called on packed batches."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.padded = network.config.model_type not in DECODERS
        """Whether texts are padded (encoders) or packed with shared prompts (decoders)."""
        self.attention: AttentionKernel = "auto"
        # The head computes in its own dtype, float32 for every dtype of the backbone.
        self.head.register_forward_pre_hook(_cast_input)
        self._reads_only_rewards = not self.padded and adapt(self._backbone)

    @property
    def head(self) -> nn.Module:
        """The module whose output is the reward: `score` in decoders, `classifier` in encoders."""
        return next(getattr(self.network, name) for name in HEADS if hasattr(self.network, name))

    @property
    def _backbone(self) -> Any:
        return getattr(self.network, self.network.base_model_prefix)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Rewards [R] float32, one per response; an empty batch gives [0]."""
        if self.padded:
            return self._padded_rewards(batch)
        return self._packed_rewards(batch)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Disable gradients and dropout in the block; restores the training mode."""
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(was_training)

    def _packed_rewards(self, batch: PackedBatch) -> Tensor:
        count = len(batch.reward_index)
        if not batch.num_tokens:
            batch = _one_token(batch)
        hidden = self._backbone(
            input_ids=batch.input_ids.unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            use_cache=False,
            packed=dispatch.lay_out(batch, self.attention),
        ).last_hidden_state[0]  # [R, D], or [T, D]
        if not self._reads_only_rewards:
            hidden = hidden.index_select(0, batch.reward_index)
        # A clone, since FSDP2 registers its backward hooks on the outputs, which may not be views.
        return self.head(hidden)[:count].squeeze(-1).float().clone()

    def _padded_rewards(self, batch: PackedBatch) -> Tensor:
        input_ids, mask = pad_texts(batch, self.network.config.pad_token_id)
        logits = self.network(input_ids=input_ids, attention_mask=mask).logits  # [R or 1, 1]
        return logits[: len(batch.reward_index), 0].float().clone()


def _one_token(batch: PackedBatch) -> PackedBatch:
    """The empty batch with one dummy token, whose reward is discarded.

    A rank without data runs this dummy forward pass so that all ranks run the same collectives. Every parameter gets a
    (zero) gradient, the key and value projections included.
    """
    zero = batch.input_ids.new_zeros(1)
    return replace(
        batch,
        input_ids=zero,
        positions=zero,
        group=zero,
        response=zero,
        reward_index=zero,
        group_lengths=(1,),
        tail_lengths=((1,),),
    )


def _cast_input(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(value.to(dtype) if isinstance(value, Tensor) else value for value in arguments)


def pad_texts(batch: PackedBatch, pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Full texts, padded on the right: input_ids [R, L] and attention_mask [R, L]; [1, 1] for an empty batch."""
    texts: list[Tensor] = []
    start = 0
    for length, tails in zip(batch.group_lengths, batch.tail_lengths, strict=True):
        tail_start = start + length - sum(tails)
        prefix = batch.input_ids[start:tail_start]
        for tail in tails:
            texts.append(torch.cat([prefix, batch.input_ids[tail_start : tail_start + tail]]))
            tail_start += tail
        start += length
    texts = texts or [batch.input_ids.new_zeros(1)]
    mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    return pad_sequence(texts, batch_first=True, padding_value=pad_token_id), mask


@dataclass(frozen=True)
class LoadedModel:
    """A model in float32 on the CPU, and which of its tensors were missing in the folder."""

    model: RewardModel
    head_name: str = ""
    """Tensor of the folder that the reward head was loaded from; empty if the head is newly initialized."""
    head_bias: float = 0.0
    """Constant that the folder's head adds to each reward. `model` is without it: `score` has no bias."""
    new_parts: tuple[str, ...] = ()
    """Names of tensors missing in the folder (head, pooler): newly initialized, to be trained."""

    @property
    def has_own_head(self) -> bool:
        """Whether the folder has the weights of the reward head."""
        return bool(self.head_name)


def load_reward_model(
    path: str, *, key: str = "model.partial_pretrain", trust_remote_code: bool = False, dropout: float = 0.0,
    new_head: bool | None = False,
) -> LoadedModel:  # fmt: skip
    """Load a backbone or a reward model as a sequence classification model with one label.

    key: configuration key that `path` comes from, for messages. new_head: initialize a new head even if the folder has
    one; None never initializes a weight. Raises UserError for a folder without configuration or weights, an
    architecture that is not supported, a head that cannot be run, a reward model without its head, and weights that are
    incomplete, quantized, all zero or not finite.
    """
    from transformers import AutoModelForSequenceClassification

    source = open_model(path, key=key, trust_remote_code=trust_remote_code, dropout=dropout, new_head=new_head)
    network, head = source.load(AutoModelForSequenceClassification, torch.float32, trust_remote_code=trust_remote_code)
    return LoadedModel(RewardModel(network), head.name, head.bias, head.new_parts)


def max_positions(model: RewardModel) -> int | None:
    """Maximum number of tokens of one text by the model's position embeddings; None if there is no limit."""
    config = model.network.config
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and architecture(config.model_type).positions_after_padding:
        limit -= config.pad_token_id + 1  # positions start after the padding id
    return limit
