"""Attention by plain matrix products, forward and backward written out: the fast way on a CPU.

The fused kernel of torch is 1.1 to 2.3 times slower there in bfloat16, and for short groups in float32 (docs/log.md).
Here queries, keys and values are cut from the pack once, the key heads of grouped queries are not repeated, and the
gradients are put back in one piece instead of being added up in tensors full of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# T tokens, B groups of a bucket, L its longest group, H heads, G key heads, D head dimension; H = G x queries

_KEEP_UP_TO = 512  # tokens; probabilities of longer groups are computed again in the backward pass, to save memory


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, *, indices: Sequence[Tensor], restore: Tensor, biases: Sequence[Tensor],
    scaling: float,
) -> Tensor:  # fmt: skip
    """Attention of each bucket's groups.

    query: [T, H, D]; key, value: [T, G, D]. indices: by bucket, [B, L] tokens of its groups. restore: [T] where each
    token went in the buckets' rows; places of a bucket that it does not name are padding. biases: by bucket,
    [B, 1, L, L], 0 where a query (third axis) sees a key and minus infinity elsewhere. Returns [T, H, D].
    """
    result: Tensor = _PlainAttention.apply(query, key, value, tuple(indices), restore, tuple(biases), scaling)
    return result


class _PlainAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, indices: tuple[Tensor, ...], restore: Tensor,
        biases: tuple[Tensor, ...], scaling: float,
    ) -> Tensor:  # fmt: skip
        heads = key.shape[1]
        outputs: list[Tensor] = []
        kept: list[Tensor] = []
        for index, bias in zip(indices, biases, strict=True):
            q, k, v = (_cut(part, index, heads) for part in (query, key, value))
            weights = _weights(q, k, bias, scaling)
            outputs.append(_paste(torch.bmm(weights, v), index, heads))
            if index.shape[1] <= _KEEP_UP_TO:
                kept.append(weights)
        ctx.indices, ctx.biases, ctx.scaling = indices, biases, scaling
        ctx.save_for_backward(query, key, value, restore, *kept)
        return torch.cat(outputs).index_select(0, restore)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, restore, *kept = ctx.saved_tensors
        heads = key.shape[1]
        parts: tuple[list[Tensor], ...] = ([], [], [])
        # Rows of padding get no gradient: they are copies of real tokens, whose outputs nobody read.
        rows = sum(index.numel() for index in ctx.indices)
        gradient = gradients[0].new_zeros(rows, *gradients[0].shape[1:]).index_copy_(0, restore, gradients[0])
        start = 0
        for index, bias in zip(ctx.indices, ctx.biases, strict=True):
            q, k, v = (_cut(part, index, heads) for part in (query, key, value))
            weights = kept.pop(0) if index.shape[1] <= _KEEP_UP_TO else _weights(q, k, bias, ctx.scaling)
            place = torch.arange(start, start + index.numel(), device=index.device).view(index.shape)
            start += index.numel()
            output = _cut(gradient, place, heads)
            wanted = torch.bmm(output, v.transpose(1, 2))
            logits = torch._softmax_backward_data(wanted, weights, -1, weights.dtype).mul_(ctx.scaling)
            parts[0].append(_paste(torch.bmm(logits, k), index, heads))
            parts[1].append(_paste(torch.bmm(logits.transpose(1, 2), q), index, heads))
            parts[2].append(_paste(torch.bmm(weights.transpose(1, 2), output), index, heads))
        return *(torch.cat(part).index_select(0, restore) for part in parts), None, None, None, None


def _cut(part: Tensor, index: Tensor, heads: int) -> Tensor:
    """[rows, n x heads, D] -> [B x heads, n x L, D]: the tokens of a bucket, its queries by the key head they share."""
    size = part.shape[-1]
    cut = part.index_select(0, index.view(-1)).view(*index.shape, heads, -1, size)  # [B, L, heads, n, D]
    return cut.permute(0, 2, 3, 1, 4).reshape(len(index) * heads, -1, size)


def _paste(part: Tensor, index: Tensor, heads: int) -> Tensor:
    """[B x heads, n x L, D] -> [B x L, n x heads, D]: the way back."""
    size = part.shape[-1]
    whole = part.view(len(index), heads, -1, index.shape[1], size)  # [B, heads, n, L, D]
    return whole.permute(0, 3, 1, 2, 4).reshape(index.numel(), -1, size)


def _weights(q: Tensor, k: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """[B x heads, n x L, L] attention probabilities."""
    logits = torch.bmm(q, k.transpose(1, 2)).mul_(scaling)
    logits.view(len(bias), -1, *bias.shape[2:]).add_(bias)
    return logits.softmax(-1)
