"""Attention on a CPU: by plain matrix products for training, and over the prompt apart for scoring.

`plain_attention` writes forward and backward out. The fused kernel of torch is 1.1 to 2.3 times slower there in
bfloat16, and for short groups in float32 (docs/log.md). Queries, keys and values are cut from the pack once, the key
heads of grouped queries are not repeated, and the gradients are put back in one piece instead of being added up in
tensors full of zeros.

`split_attention`, where nothing is learned, attends to the prompt and to each response's own text apart. The two are
put together by their log-sum-exps (Juravsky et al. 2024, "Hydragen", section 3.2). So the prompt's keys are one product
for all responses of a group, and nothing is gathered, padded or masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rm_gallery.modeling.attention.layout import PackLayout

# T tokens, N queries, B groups of a bucket, Q and L queries and keys of its longest group
# H heads, G key heads, D head dimension, n = H / G

_KEEP_UP_TO = 512  # tokens; probabilities of longer groups are computed again in the backward pass, to save memory


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, *, queries: Sequence[Tensor], keys: Sequence[Tensor],
    query_restore: Tensor, key_restore: Tensor, biases: Sequence[Tensor], scaling: float,
) -> Tensor:  # fmt: skip
    """Attention of each bucket's groups.

    query: [N, H, D]; key, value: [T, G, D]. queries: by bucket, [B, Q] rows of `query`. keys: by bucket, [B, L] tokens
    that they see. query_restore: [N] where each query went in the buckets' rows, and key_restore: [T] the same of the
    keys; places that they do not name are padding. biases: by bucket, [B, 1, Q, L], 0 where a query sees a key and
    minus infinity elsewhere. Returns [N, H, D].
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
            q, k, v = _cut(query, rows, heads), _cut(key, index, heads), _cut(value, index, heads)
            weights = _weights(q, k, bias, scaling)
            outputs.append(_paste(torch.bmm(weights, v), rows, heads))
            if index.shape[1] <= _KEEP_UP_TO:
                kept.append(weights)
        ctx.queries, ctx.keys, ctx.biases, ctx.scaling = queries, keys, biases, scaling
        ctx.save_for_backward(query, key, value, query_restore, key_restore, *kept)
        return torch.cat(outputs).index_select(0, query_restore)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, query_restore, key_restore, *kept = ctx.saved_tensors
        heads = key.shape[1]
        parts: tuple[list[Tensor], ...] = ([], [], [])
        # Rows of padding get no gradient: they are copies of real tokens, whose outputs nobody read.
        num_rows = sum(rows.numel() for rows in ctx.queries)
        gradient = gradients[0].new_zeros(num_rows, *gradients[0].shape[1:])
        gradient.index_copy_(0, query_restore, gradients[0])
        start = 0
        for rows, index, bias in zip(ctx.queries, ctx.keys, ctx.biases, strict=True):
            q, k, v = _cut(query, rows, heads), _cut(key, index, heads), _cut(value, index, heads)
            weights = kept.pop(0) if index.shape[1] <= _KEEP_UP_TO else _weights(q, k, bias, ctx.scaling)
            place = torch.arange(start, start + rows.numel(), device=rows.device).view(rows.shape)
            start += rows.numel()
            output = _cut(gradient, place, heads)
            wanted = torch.bmm(output, v.transpose(1, 2))
            logits = torch._softmax_backward_data(wanted, weights, -1, weights.dtype).mul_(ctx.scaling)
            parts[0].append(_paste(torch.bmm(logits, k), rows, heads))
            parts[1].append(_paste(torch.bmm(logits.transpose(1, 2), q), index, heads))
            parts[2].append(_paste(torch.bmm(weights.transpose(1, 2), output), index, heads))
        restores = (query_restore, key_restore, key_restore)
        whole = (torch.cat(part).index_select(0, restore) for part, restore in zip(parts, restores, strict=True))
        return *whole, None, None, None, None, None, None


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
    """[B x heads, n x Q, L] attention probabilities."""
    logits = torch.bmm(q, k.transpose(1, 2)).mul_(scaling)
    logits.view(len(bias), -1, *bias.shape[2:]).add_(bias)
    return logits.softmax(-1)


# T tokens, Q queries, L keys, H heads, G key heads, D head dimension

_MIN_TOKENS = 32  # for each call: with shorter texts, masks over whole groups cost less than so many calls


def suits(layout: PackLayout, window: int | None) -> bool:
    """Whether the texts are long enough, and no sliding window ends within one."""
    num_calls = len(layout.tails) + 2 * len(layout.lengths)
    is_worth_it = int(layout.lengths.sum()) >= _MIN_TOKENS * num_calls
    return is_worth_it and (window is None or window >= layout.longest_text)


def split_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, *, scaling: float) -> Tensor:
    """Attention of all tokens on a CPU, without gradients.

    query: [T, H, D]; key, value: [T, G, D]. Returns [T, H, D].
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))  # [1, H, T, D]
    tails = iter(layout.tails.tolist())
    outputs: list[Tensor] = []
    end = 0
    for prefix, count in zip(layout.prefixes.tolist(), layout.num_tails.tolist(), strict=True):
        start, middle = end, end + prefix
        own, weights = [], []
        end = middle
        for length in (next(tails) for _ in range(count)):
            part = slice(end, end + length)
            output, log_sum = _flash(q[:, :, part], k[:, :, part], v[:, :, part], scaling, is_causal=True)
            own.append(output)
            weights.append(log_sum)
            end += length
        if prefix:
            shared = k[:, :, start:middle], v[:, :, start:middle]
            outputs.append(_flash(q[:, :, start:middle], *shared, scaling, is_causal=True)[0])
            output, log_sum = _flash(q[:, :, middle:end], *shared, scaling, is_causal=False)
            share = torch.cat(weights, 1).sub_(log_sum).sigmoid_()  # of the own text in the softmax over both
            own = [output.lerp_(torch.cat(own, 1), share.unsqueeze(-1))]
        outputs += own
    return torch.cat(outputs, 1)[0]


def _flash(q: Tensor, k: Tensor, v: Tensor, scaling: float, *, is_causal: bool) -> tuple[Tensor, Tensor]:
    """[1, H, Q, D], [1, H, L, D] -> outputs [1, Q, H, D] and log-sum-exps [1, Q, H].

    This is what scaled_dot_product_attention calls on a CPU; that one keeps the log-sum-exps to itself.
    """
    output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scaling)
    return output.transpose(1, 2), log_sum.transpose(1, 2)
