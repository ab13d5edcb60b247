"""Attention on a CPU: batched matrix products for training, and prefix and responses apart for scoring.

`plain_attention` has its forward and backward passes written out. On a CPU, PyTorch's fused kernel is 1.1 to 2.3 times
slower in bfloat16, and for short groups in float32 (docs/log.md). Ours gathers queries, keys and values from the pack
once, does not repeat the key heads of grouped-query attention, and scatters gradients back once, instead of
accumulating tensors that are mostly zero.

`split_attention`, for inference only, attends to the prefix and to each response's own text separately, and merges the
two by their log-sum-exps (Juravsky et al. 2024, "Hydragen", section 3.2). The prefix's keys are one product for all
responses of a group, and nothing is gathered, padded or masked. Example, one query with the scores [1, 2] over the
prefix and [3] over its own tokens: the log-sum-exps are log(e + e^2) = 2.313 and 3, and the own tokens weigh
e^3 / (e + e^2 + e^3) = sigmoid(3 - 2.313) = 0.665 in the softmax over all three. The output is 0.335 of the prefix's
output plus 0.665 of the own output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rm_gallery.modeling.attention.layout import AttentionSpec, PackLayout

# T tokens, N queries (T, or R in the last layer), B groups of a bucket, Q and K queries and keys of its longest group
# H query heads, H_kv key heads, n = H / H_kv query heads per key head, D head dimension

_SAVE_PROBABILITIES_UP_TO = 512  # keys of a group; longer ones are recomputed in the backward pass, to save memory
_MAX_SCORES = 2**26  # attention scores of one product; a bucket with more is computed in pieces


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: PackLayout, spec: AttentionSpec, *, rewards_only: bool = False
) -> Tensor:
    """query: [N, H, D]; key, value: [T, H_kv, D]. Returns [N, H, D]."""
    queries = packed.queries(rewards_only=rewards_only)
    pieces: list[tuple[Tensor, ...]] = []
    for number, bucket in enumerate(queries.buckets):
        parts = bucket.query_rows, bucket.key_tokens, queries.bias(number, spec.reach, query.dtype)
        count = max(1, _MAX_SCORES // (query.shape[1] * parts[2][0].numel()))  # groups of a piece
        pieces += [parts] if count >= len(parts[0]) else zip(*(part.split(count) for part in parts), strict=True)
    query_rows, key_tokens, biases = zip(*pieces, strict=True)
    result: Tensor = _PlainAttention.apply(
        query, key, value, spec.sinks, query_rows, key_tokens, queries.restore, packed.all_tokens.restore, biases, spec
    )
    return result


class _PlainAttention(torch.autograd.Function):
    """By piece of a bucket: query_rows [B, Q], key_tokens [B, K] and biases [B, 1, Q, K]; see `layout.Bucket`.

    query_restore [N] and key_restore [T]: the row of each query and key in the concatenated rows of all buckets.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, query_rows: tuple[Tensor, ...],
        key_tokens: tuple[Tensor, ...], query_restore: Tensor, key_restore: Tensor, biases: tuple[Tensor, ...],
        spec: AttentionSpec,
    ) -> Tensor:  # fmt: skip
        heads = key.shape[1]
        outputs: list[Tensor] = []
        saved: list[Tensor | None] = []
        for rows, tokens, bias in zip(query_rows, key_tokens, biases, strict=True):
            q, k, v = _gather(query, rows, heads), _gather(key, tokens, heads), _gather(value, tokens, heads)
            probabilities, slope = _probabilities(q, k, bias, sinks, spec)
            kept = _draw_kept(q, tokens, spec.dropout)
            outputs.append(_to_rows(torch.bmm(_weights(probabilities, kept, sinks), v), rows, heads))
            is_saved = tokens.shape[1] <= _SAVE_PROBABILITIES_UP_TO
            saved += [probabilities, slope, kept] if is_saved else [None, None, kept]
        ctx.query_rows, ctx.key_tokens, ctx.biases, ctx.spec = query_rows, key_tokens, biases, spec
        ctx.save_for_backward(query, key, value, sinks, query_restore, key_restore, *saved)
        return torch.cat(outputs).index_select(0, query_restore)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, query_restore, key_restore, *saved = ctx.saved_tensors
        heads = key.shape[1]
        d_sinks = (
            None if sinks is None else torch.zeros_like(sinks, dtype=torch.promote_types(sinks.dtype, torch.float))
        )
        parts: tuple[list[Tensor], ...] = ([], [], [])
        # Output gradients by bucket row. Padding rows have none: they repeat real queries, and their output is dropped.
        num_rows = sum(rows.numel() for rows in ctx.query_rows)
        gradient = gradients[0].new_zeros(num_rows, *gradients[0].shape[1:])
        gradient.index_copy_(0, query_restore, gradients[0])
        start = 0
        for rows, tokens, bias in zip(ctx.query_rows, ctx.key_tokens, ctx.biases, strict=True):
            q, k, v = _gather(query, rows, heads), _gather(key, tokens, heads), _gather(value, tokens, heads)
            probabilities, slope, kept = (saved.pop(0) for _ in range(3))
            if probabilities is None:
                probabilities, slope = _probabilities(q, k, bias, sinks, ctx.spec)
            place = torch.arange(start, start + rows.numel(), device=rows.device).view(rows.shape)
            start += rows.numel()
            d_out = _gather(gradient, place, heads)
            d_probabilities = torch.bmm(d_out, v.transpose(1, 2))
            if kept is not None:
                d_probabilities.mul_(kept)
            if d_sinks is not None:
                d_probabilities = F.pad(d_probabilities, (0, 1))  # the sink has no value
            d_scores = torch._softmax_backward_data(d_probabilities, probabilities, -1, probabilities.dtype)
            if d_sinks is not None:
                d_sinks += d_scores[..., -1].view(len(rows), len(d_sinks), -1).sum((0, 2), dtype=d_sinks.dtype)
                d_scores = d_scores[..., :-1]
            d_scores.mul_(ctx.spec.scaling)
            if slope is not None:
                d_scores.mul_(slope)
            parts[0].append(_to_rows(torch.bmm(d_scores, k), rows, heads))
            parts[1].append(_to_rows(torch.bmm(d_scores.transpose(1, 2), q), tokens, heads))
            weights = _weights(probabilities, kept, sinks)
            parts[2].append(_to_rows(torch.bmm(weights.transpose(1, 2), d_out), tokens, heads))
        restores = (query_restore, key_restore, key_restore)
        whole = (torch.cat(part).index_select(0, restore) for part, restore in zip(parts, restores, strict=True))
        return *whole, None if d_sinks is None else d_sinks.to(sinks.dtype), None, None, None, None, None, None


def _gather(part: Tensor, index: Tensor, heads: int) -> Tensor:
    """[rows, n x H_kv, D] -> [B x H_kv, n x L, D]: a bucket's rows, by key head; its n query heads are concatenated.

    index: [B, L]; L is Q for queries (n = H / H_kv), K for keys and values (n = 1).
    """
    size = part.shape[-1]
    rows = part.index_select(0, index.view(-1)).view(*index.shape, heads, -1, size)  # [B, L, H_kv, n, D]
    return rows.permute(0, 2, 3, 1, 4).reshape(len(index) * heads, -1, size)


def _to_rows(part: Tensor, index: Tensor, heads: int) -> Tensor:
    """[B x H_kv, n x L, D] -> [B x L, n x H_kv, D]: the inverse layout of `_gather`."""
    size = part.shape[-1]
    whole = part.view(len(index), heads, -1, index.shape[1], size)  # [B, H_kv, n, L, D]
    return whole.permute(0, 3, 1, 2, 4).reshape(index.numel(), -1, size)


def _probabilities(
    q: Tensor, k: Tensor, bias: Tensor, sinks: Tensor | None, spec: AttentionSpec
) -> tuple[Tensor, Tensor | None]:
    """Attention probabilities [B x H_kv, n x Q, K], and the derivative of the soft cap at the scores, if there is one.

    With sinks there is one more column: their share.
    """
    scores, slope = torch.bmm(q, k.transpose(1, 2)).mul_(spec.scaling), None
    if spec.softcap is not None:
        scores.div_(spec.softcap).tanh_()
        slope = 1 - scores.square()
        scores.mul_(spec.softcap)
    scores.view(len(bias), -1, *bias.shape[2:]).add_(bias)
    if sinks is not None:
        by_head = sinks.to(scores.dtype).view(1, -1, 1).expand(len(bias), -1, bias.shape[2])  # [B, H, Q]
        scores = torch.cat([scores, by_head.reshape(*scores.shape[:2], 1)], -1)
    return scores.softmax(-1), slope


def _draw_kept(q: Tensor, tokens: Tensor, dropout: float) -> Tensor | None:
    """[B x H_kv, n x Q, K] factors of attention dropout: 0, or 1 / (1 - dropout)."""
    if not dropout:
        return None
    return q.new_empty(*q.shape[:2], tokens.shape[1]).bernoulli_(1 - dropout).div_(1 - dropout)


def _weights(probabilities: Tensor, kept: Tensor | None, sinks: Tensor | None) -> Tensor:
    """Weights of the values: probabilities without the column of the sinks, after dropout."""
    weights = probabilities if sinks is None else probabilities[..., :-1]
    return weights if kept is None else weights * kept


_MIN_TOKENS_PER_CALL = 32  # with shorter texts, one masked call per bucket is faster than many small ones


def is_worth_splitting(layout: PackLayout) -> bool:
    """Whether the texts are long enough for `split_attention`."""
    num_calls = len(layout.tails) + 2 * len(layout.lengths)
    return int(layout.lengths.sum()) >= _MIN_TOKENS_PER_CALL * num_calls


def split_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: PackLayout, spec: AttentionSpec, *, rewards_only: bool = False
) -> Tensor:
    """Attention of all tokens, forward only, without window or chunks. query: [T, H, D]; key, value: [T, H_kv, D].

    Returns [T, H, D].
    """
    assert not rewards_only
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))  # [1, H, T, D]
    tails = iter(packed.tails.tolist())
    outputs: list[Tensor] = []
    sums: list[Tensor] = []
    end = 0
    for prefix, count in zip(packed.prefixes.tolist(), packed.num_tails.tolist(), strict=True):
        start, middle = end, end + prefix
        # 1. Each response over its own keys.
        own, log_sums = [], []
        end = middle
        for length in (next(tails) for _ in range(count)):
            part = slice(end, end + length)
            output, log_sum = _flash(q[:, :, part], k[:, :, part], v[:, :, part], spec.scaling, is_causal=True)
            own.append(output)
            log_sums.append(log_sum)
            end += length
        if prefix:
            # 2. The prefix over itself, and all responses over the prefix.
            shared = k[:, :, start:middle], v[:, :, start:middle]
            output, log_sum = _flash(q[:, :, start:middle], *shared, spec.scaling, is_causal=True)
            outputs.append(output)
            sums.append(log_sum)
            output, log_sum = _flash(q[:, :, middle:end], *shared, spec.scaling, is_causal=False)
            # 3. Merge. With s = log-sum-exp, the own text has the share e^s_own / (e^s_own + e^s_prefix) of the joint
            #    softmax, which is sigmoid(s_own - s_prefix).
            own_sum = torch.cat(log_sums, 1)
            share = (own_sum - log_sum).sigmoid_()
            own = [output.lerp_(torch.cat(own, 1), share.unsqueeze(-1))]
            log_sums = [own_sum.logaddexp(log_sum)] if spec.sinks is not None else []
        outputs += own
        sums += log_sums
    whole = torch.cat(outputs, 1)[0]
    if spec.sinks is not None:  # the keys have the share e^s / (e^s + e^sink) of a softmax that includes the sink
        whole.mul_((torch.cat(sums, 1)[0] - spec.sinks).sigmoid_().unsqueeze(-1))
    return whole


def _flash(q: Tensor, k: Tensor, v: Tensor, scaling: float, *, is_causal: bool) -> tuple[Tensor, Tensor]:
    """[1, H, Q, D], [1, H, K, D] -> outputs [1, Q, H, D] and log-sum-exps [1, Q, H].

    The operation that scaled_dot_product_attention calls on a CPU, which does not return the log-sum-exps.
    """
    output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scaling)
    return output.transpose(1, 2), log_sum.transpose(1, 2)
