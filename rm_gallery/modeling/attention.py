"""Attention over packed groups: the rule in one place, a plain reference, and the kernel that runs.

Token q sees key k when both are in the same group, k is not after q, and k belongs to the common prefix or to q's
own response. `install` registers the kernel with transformers' attention interface, so model code stays the library's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rm_gallery.data.batch import PackedBatch
from rm_gallery.errors import UserError
from rm_gallery.modeling.attention_plain import plain_attention

# T tokens, B groups of a bucket, L longest group of it, H heads, D head dimension

NAME = "rm_gallery_packed"
_PLAIN_UP_TO = {torch.bfloat16: 2048, torch.float32: 256}  # tokens of a pack's longest group
_LEAST_FILL = 0.75  # a bucket's shortest group has at least this share of its longest one's tokens


def visible(q: Tensor, k: Tensor, window: int | None = None) -> Tensor:
    """The attention rule. q: [..., Q, 3] and k: [..., K, 3] hold (group, response, position); gives bool [..., Q, K].

    window: a layer's sliding window, in tokens of the text that the token stands in.
    """
    group_q, response_q, position_q = q.unsqueeze(-2).unbind(-1)  # [..., Q, 1]
    group_k, response_k, position_k = k.unsqueeze(-3).unbind(-1)  # [..., 1, K]
    seen = (group_q == group_k) & (position_k <= position_q) & ((response_k == -1) | (response_k == response_q))
    if window is not None:
        seen = seen & (position_q - position_k < window)
    return seen


@dataclass(frozen=True)
class _Bucket:
    index: Tensor
    """[B, L] int64 tokens of B groups; places past a group's end repeat its first token."""
    labels: Tensor
    """[B, L, 3] (group, response, position); -2 in the places past the end, which see only themselves."""


@dataclass(frozen=True)
class PackLayout:
    """What attention needs to know of one batch: worked out once, used by every layer."""

    labels: Tensor
    """[T, 3] (group, response, position) of each token."""
    buckets: list[_Bucket]
    restore: Tensor
    """[T] where each token went in the buckets' rows, laid one after the other."""
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    """(bucket, window) -> bool [B, 1, L, L], filled as layers ask."""
    biases: dict[tuple[int, int | None, torch.dtype], Tensor] = field(default_factory=dict)
    """The same with a type: 0 and minus infinity."""

    def mask(self, bucket: int, window: int | None) -> Tensor:
        key = (bucket, window)
        if key not in self.masks:
            labels = self.buckets[bucket].labels
            self.masks[key] = visible(labels, labels, window).unsqueeze(1)
        return self.masks[key]

    def bias(self, bucket: int, window: int | None, dtype: torch.dtype) -> Tensor:
        key = (bucket, window, dtype)
        if key not in self.biases:
            mask = self.mask(bucket, window)
            self.biases[key] = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
                ~mask, float("-inf")
            )
        return self.biases[key]


def lay_out(batch: PackedBatch) -> PackLayout:
    """Sort the groups of a batch into buckets of like length, so that padding inside attention stays small."""
    device = batch.input_ids.device
    labels = torch.stack([batch.group, batch.response, batch.positions], dim=-1)  # [T, 3]
    starts = [0]
    for length in batch.group_lengths:
        starts.append(starts[-1] + length)
    by_length = sorted(range(len(batch.group_lengths)), key=lambda group: -batch.group_lengths[group])
    buckets: list[_Bucket] = []
    restore = torch.empty(batch.num_tokens, dtype=torch.int64, device=device)
    rows = 0
    while by_length:
        longest = batch.group_lengths[by_length[0]]
        count = sum(batch.group_lengths[group] >= _LEAST_FILL * longest for group in by_length)
        members, by_length = by_length[:count], by_length[count:]
        start = torch.tensor([starts[group] for group in members], device=device).unsqueeze(1)  # [B, 1]
        lengths = torch.tensor([batch.group_lengths[group] for group in members], device=device).unsqueeze(1)
        place = torch.arange(longest, device=device).unsqueeze(0)  # [1, L]
        inside = place < lengths  # [B, L]
        index = torch.where(inside, start + place, start)
        outside = torch.stack([torch.full_like(index, -2), torch.full_like(index, -2), place.expand_as(index)], dim=-1)
        buckets.append(_Bucket(index, torch.where(inside.unsqueeze(-1), labels[index], outside)))
        restore[index[inside]] = rows + torch.arange(index.numel(), device=device).view_as(index)[inside]
        rows += index.numel()
    return PackLayout(labels, buckets, restore)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    packed: PackLayout, scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The kernel, with the signature of transformers' attention interface: plain products or one call per bucket.

    query: [1, H, T, D]; key, value: [1, H_kv, T, D]. Returns [1, T, H, D].
    """
    if softcap is not None or s_aux is not None:
        raise UserError(f"{type(module).__name__}: attention with a soft cap or sinks is not supported in packed form")
    if not packed.buckets:
        return query.transpose(1, 2), None
    tokens = [part[0].transpose(0, 1) for part in (query, key, value)]  # each [T, heads, D]
    if not dropout and _is_plain_faster(query, packed):
        return plain_attention(
            *tokens,
            indices=[bucket.index for bucket in packed.buckets],
            restore=packed.restore,
            biases=[packed.bias(number, sliding_window, query.dtype) for number in range(len(packed.buckets))],
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        ).unsqueeze(0), None
    repeats = query.shape[1] // key.shape[1]
    outputs = []
    for number, bucket in enumerate(packed.buckets):
        size = bucket.index.shape  # B, L
        q, k, v = (
            part.index_select(0, bucket.index.view(-1)).view(*size, *part.shape[1:]).transpose(1, 2) for part in tokens
        )  # each [B, heads, L, D]
        # Key heads are repeated by hand: with `enable_gqa` and a mask, some GPU back ends fall back to plain matrices.
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        mask = packed.mask(number, sliding_window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # [B x L, H, D]
    return torch.cat(outputs).index_select(0, packed.restore).unsqueeze(0), None


def _is_plain_faster(query: Tensor, packed: PackLayout) -> bool:
    """By measurement on a CPU (docs/log.md); on a GPU the fused kernels are."""
    longest = max(bucket.index.shape[1] for bucket in packed.buckets)
    return query.device.type == "cpu" and longest <= _PLAIN_UP_TO.get(query.dtype, 0)


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, labels: Tensor, *, scaling: float, window: int | None = None
) -> Tensor:
    """The rule written out over all T x T pairs; what every kernel is tested against.

    query: [H, T, D]; key, value: [H_kv, T, D]; labels: [T, 3]. Returns [T, H, D].
    """
    repeats = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
    logits = (query @ key.transpose(1, 2)) * scaling  # [H, T, T]
    logits = logits.masked_fill(~visible(labels, labels, window), float("-inf"))
    return (logits.softmax(-1) @ value).transpose(0, 1)


def _no_mask(*_: Any, **__: Any) -> None:
    """The layout carries the mask; transformers need not build one."""


def install() -> None:
    """Make `attn_implementation=NAME` known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
