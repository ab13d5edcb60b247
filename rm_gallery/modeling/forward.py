"""The two forward passes of a sequence classification network: on packed tokens, and on padded texts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.modeling.attention import dispatch
from rm_gallery.modeling.attention.past import PastKeys
from rm_gallery.modeling.heads import HEADS

# T tokens, R responses, L longest text, D hidden


def head_of(network: Any) -> nn.Module | None:
    """The module whose output is the reward, by the names of `HEADS`; None for other heads."""
    found = (getattr(network, name, None) for name in HEADS)
    return next((each for each in found if isinstance(each, nn.Module)), None)


def packed_rewards(
    network: Any, batch: PackedBatch, kernel: str, *, reads_only_rewards: bool = False, past: PastKeys | None = None
) -> Tensor:
    """Rewards [R] float32 of a network whose attention is `dispatch.NAME`, or [R, A] with A labels; an empty batch
    gives [0].

    reads_only_rewards: the backbone's last hidden state has the R reward tokens only. past: keys and values of prefixes
    that are known.
    """
    count = len(batch.reward_index)
    if not batch.num_tokens:
        batch = one_token(batch)
    layout = dispatch.lay_out(batch, kernel, past)
    hidden = packed_hidden(network, batch, layout)  # [R, D], or [T, D]
    if not reads_only_rewards:
        hidden = hidden.index_select(0, layout.reward_index)
    head = head_of(network)
    assert head is not None
    # A clone, since FSDP2 registers its backward hooks on the outputs, which may not be views.
    return head(hidden)[:count].squeeze(-1).float().clone()


def packed_token_rewards(network: Any, batch: PackedBatch, kernel: str) -> Tensor:
    """[T] float32, or [T, A]: the reward read at every token, that of the text up to it. See `packed_rewards`."""
    layout = dispatch.lay_out(batch, kernel)
    layout.reads_all = True
    head = head_of(network)
    assert head is not None
    outputs: Tensor = head(packed_hidden(network, batch, layout))
    return outputs.squeeze(-1).float()


def packed_hidden(network: Any, batch: PackedBatch, layout: dispatch.PackLayout) -> Tensor:
    """Hidden states of the backbone of a network whose attention is `dispatch.NAME`, as its last layer gives them."""
    input_ids, positions = batch.input_ids, batch.positions
    if layout.past is not None:
        input_ids, positions = (each.index_select(0, layout.computed_rows) for each in (input_ids, positions))
    with dispatch.carry_layout(layout):
        hidden: Tensor = getattr(network, network.base_model_prefix)(
            input_ids=input_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            packed=layout,
        ).last_hidden_state[0]
    return hidden


def padded_hidden(network: Any, batch: PackedBatch, tokens: Tensor) -> Tensor:
    """[L, D] hidden states of these tokens of the batch, from whole texts, padded on the right."""
    pad = network.config.pad_token_id
    input_ids, mask = pad_texts(batch, pad if isinstance(pad, int) else 0)  # any id: no token sees padding
    backbone = getattr(network, network.base_model_prefix)
    options = {"use_cache": False} if "use_cache" in inspect.signature(backbone.forward).parameters else {}
    hidden: Tensor = backbone(input_ids=input_ids, attention_mask=mask, **options).last_hidden_state  # [R, P, D]
    # A token of a common prefix is read in the first text of its group.
    counts = np.array([len(tails) for tails in batch.tail_lengths], np.int64)
    first = torch.from_numpy(np.cumsum(counts) - counts).to(tokens.device)
    response = batch.response[tokens]
    row = torch.where(response < 0, first[batch.group[tokens]], response)
    return hidden.flatten(0, 1).index_select(0, row * hidden.shape[1] + batch.positions[tokens])


def padded_rewards(network: Any, batch: PackedBatch) -> Tensor:
    """Rewards [R] float32, or [R, A]; an empty batch gives [0]. Decoders read the last token without padding."""
    input_ids, mask = pad_texts(batch, network.config.pad_token_id)
    return text_rewards(network, input_ids, mask)[: len(batch.reward_index)].clone()


def text_rewards(network: Any, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Rewards [R] float32, or [R, A], of whole texts, padded on the right. input_ids, mask: [R, L]"""
    options = {} if mask is None else {"attention_mask": mask}
    if "use_cache" in inspect.signature(network.forward).parameters:
        options["use_cache"] = False  # type: ignore[assignment]  # no generation, so no KV cache
    logits: Tensor = network(input_ids=input_ids, **options).logits  # [R, A]
    return logits.squeeze(-1).float()


def one_token(batch: PackedBatch) -> PackedBatch:
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


def weighted_sum(rewards: Tensor, weights: Sequence[float]) -> Tensor:
    """[R]: the rewards of responses; of outputs [R, A] their sum times `weights`, which is empty for one reward."""
    if not weights:
        return rewards
    outputs = rewards if rewards.ndim == 2 else rewards.unsqueeze(1)
    return outputs @ torch.tensor(weights, dtype=outputs.dtype, device=outputs.device)
