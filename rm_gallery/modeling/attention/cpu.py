"""CPU attention kernels: plain matrix products (training), and prompt and responses computed separately (inference).

`plain_attention` implements forward and backward with batched matrix products. torch's fused kernel is 1.1 to 2.3 times
slower on CPUs in bfloat16, and for short groups in float32 (docs/log.md). Queries, keys and values are gathered from
the pack once, the key heads of grouped queries are not repeated, and gradients are scattered back in one operation.

`split_attention` is inference only. It computes attention to the prompt and to the response's own tokens separately and
merges the two by their log-sum-exps (Juravsky et al. 2024, "Hydragen", section 3.2). The prompt's keys take one matrix
product for all responses of a group, without gathering, padding or masks.

Merging, for one query with the scores [1, 2] over the prompt and [3] over its own tokens: the log-sum-exps are
log(e + e^2) = 2.313 and 3, and the own tokens weigh e^3 / (e + e^2 + e^3) = sigmoid(3 - 2.313) = 0.665 of the softmax
over all three. The output is 0.335 of the prompt's output plus 0.665 of the own output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rm_gallery.modeling.attention.layout import PackLayout

# T tokens, N queries, B groups of a bucket, Q and L queries and keys of its longest group
# H heads, G key heads, D head dimension, n = H / G

_MAX_KEPT_TOKENS = 512  # attention probabilities of longer groups are recomputed in the backward pass, to save memory


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, *, queries: Sequence[Tensor], keys: Sequence[Tensor],
    query_restore: Tensor, key_restore: Tensor, biases: Sequence[Tensor], scaling: float,
) -> Tensor:  # fmt: skip
    """Attention bucket by bucket.

    query: [N, H, D]; key, value: [T, G, D]. queries: per bucket, [B, Q] rows of `query`. keys: per bucket, [B, L] rows
    of `key` and `value`. query_restore: [N] index of each query in the concatenated rows of the buckets;
    key_restore: [T] the same for keys. biases: per bucket, [B, 1, Q, L], 0 where a query sees a key and minus infinity
    elsewhere. Returns [N, H, D].
    """
    result: Tensor = _PlainAttention.apply(
        query, key, value, tuple(queries), tuple(keys), query_restore, key_restore, tuple(biases), scaling
    )
    return result


class _PlainAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...],
        query_restore: Tensor, key_restore: Tensor, biases: tuple[Tensor, ...], scaling: float,
    ) -> Tensor:  # fmt: skip
        heads = key.shape[1]
        outputs: list[Tensor] = []
        kept: list[Tensor] = []
        for rows, index, bias in zip(queries, keys, biases, strict=True):
            q, k, v = _gather(query, rows, heads), _gather(key, index, heads), _gather(value, index, heads)
            weights = _weights(q, k, bias, scaling)
            outputs.append(_scatter(torch.bmm(weights, v), rows, heads))
            if index.shape[1] <= _MAX_KEPT_TOKENS:
                kept.append(weights)
        ctx.queries, ctx.keys, ctx.biases, ctx.scaling = queries, keys, biases, scaling
        ctx.save_for_backward(query, key, value, query_restore, key_restore, *kept)
        return torch.cat(outputs).index_select(0, query_restore)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, query_restore, key_restore, *kept = ctx.saved_tensors
        heads = key.shape[1]
        parts: tuple[list[Tensor], ...] = ([], [], [])
        # Padding rows get no gradient: they are copies of real tokens, and their outputs were dropped.
        num_rows = sum(rows.numel() for rows in ctx.queries)
        gradient = gradients[0].new_zeros(num_rows, *gradients[0].shape[1:])
        gradient.index_copy_(0, query_restore, gradients[0])
        start = 0
        # With P = softmax(S): dV = P^T dO, dP = dO V^T, dS = P (dP - sum(dP P)), dQ = dS K, dK = dS^T Q.
        for rows, index, bias in zip(ctx.queries, ctx.keys, ctx.biases, strict=True):
            q, k, v = _gather(query, rows, heads), _gather(key, index, heads), _gather(value, index, heads)
            weights = kept.pop(0) if index.shape[1] <= _MAX_KEPT_TOKENS else _weights(q, k, bias, ctx.scaling)
            place = torch.arange(start, start + rows.numel(), device=rows.device).view(rows.shape)
            start += rows.numel()
            output = _gather(gradient, place, heads)
            wanted = torch.bmm(output, v.transpose(1, 2))
            logits = torch._softmax_backward_data(wanted, weights, -1, weights.dtype).mul_(ctx.scaling)
            parts[0].append(_scatter(torch.bmm(logits, k), rows, heads))
            parts[1].append(_scatter(torch.bmm(logits.transpose(1, 2), q), index, heads))
            parts[2].append(_scatter(torch.bmm(weights.transpose(1, 2), output), index, heads))
        restores = (query_restore, key_restore, key_restore)
        whole = (torch.cat(part).index_select(0, restore) for part, restore in zip(parts, restores, strict=True))
        return *whole, None, None, None, None, None, None


def _gather(part: Tensor, index: Tensor, heads: int) -> Tensor:
    """[rows, n x heads, D] -> [B x heads, n x L, D]: the rows of a bucket, query heads grouped by their key head."""
    size = part.shape[-1]
    rows = part.index_select(0, index.view(-1)).view(*index.shape, heads, -1, size)  # [B, L, heads, n, D]
    return rows.permute(0, 2, 3, 1, 4).reshape(len(index) * heads, -1, size)


def _scatter(part: Tensor, index: Tensor, heads: int) -> Tensor:
    """[B x heads, n x L, D] -> [B x L, n x heads, D], the inverse of `_gather`."""
    size = part.shape[-1]
    whole = part.view(len(index), heads, -1, index.shape[1], size)  # [B, heads, n, L, D]
    return whole.permute(0, 3, 1, 2, 4).reshape(index.numel(), -1, size)


def _weights(q: Tensor, k: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """[B x heads, n x Q, L] attention probabilities."""
    logits = torch.bmm(q, k.transpose(1, 2)).mul_(scaling)
    logits.view(len(bias), -1, *bias.shape[2:]).add_(bias)
    return logits.softmax(-1)


# T tokens, Q queries, L keys, H heads, G key heads, D head dimension

_MIN_TOKENS = 32  # per kernel call; with shorter texts, one masked call per bucket is faster than many calls


def suits(layout: PackLayout, window: int | None) -> bool:
    """Whether `split_attention` is faster (texts are long enough) and exact (no sliding window ends inside a text)."""
    num_calls = len(layout.tails) + 2 * len(layout.lengths)
    is_worth_it = int(layout.lengths.sum()) >= _MIN_TOKENS * num_calls
    return is_worth_it and (window is None or window >= layout.longest_text)


def split_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, *, scaling: float) -> Tensor:
    """Attention of all tokens, forward only.

    query: [T, H, D]; key, value: [T, G, D]. Returns [T, H, D].
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))  # [1, H, T, D]
    tails = iter(layout.tails.tolist())
    outputs: list[Tensor] = []
    end = 0
    for prefix, count in zip(layout.prefixes.tolist(), layout.num_tails.tolist(), strict=True):
        # A group is q[start:middle], the prefix, and q[middle:end], its responses one after the other.
        start, middle = end, end + prefix
        own, weights = [], []
        end = middle
        # 1. Each response attends to its own tokens, causally.
        for length in (next(tails) for _ in range(count)):
            part = slice(end, end + length)
            output, log_sum = _flash(q[:, :, part], k[:, :, part], v[:, :, part], scaling, is_causal=True)
            own.append(output)
            weights.append(log_sum)
            end += length
        if prefix:
            # 2. The prefix attends to itself, causally, and all responses attend to the prefix, without a mask.
            shared = k[:, :, start:middle], v[:, :, start:middle]
            outputs.append(_flash(q[:, :, start:middle], *shared, scaling, is_causal=True)[0])
            output, log_sum = _flash(q[:, :, middle:end], *shared, scaling, is_causal=False)
            # 3. Merge: `share` is the weight of the own tokens in the softmax over both.
            share = torch.cat(weights, 1).sub_(log_sum).sigmoid_()
            own = [output.lerp_(torch.cat(own, 1), share.unsqueeze(-1))]
        outputs += own
    return torch.cat(outputs, 1)[0]


def _flash(q: Tensor, k: Tensor, v: Tensor, scaling: float, *, is_causal: bool) -> tuple[Tensor, Tensor]:
    """[1, H, Q, D], [1, H, L, D] -> outputs [1, Q, H, D] and log-sum-exps [1, Q, H].

    The operator that scaled_dot_product_attention runs on CPUs, which does not return the log-sum-exps.
    """
    output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scaling)
    return output.transpose(1, 2), log_sum.transpose(1, 2)
