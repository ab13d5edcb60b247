"""Attention over the prompt and over each response's own text apart, where nothing is learned: scoring on a CPU.

The two are put together by their log-sum-exps (Juravsky et al. 2024, "Hydragen", section 3.2). So the prompt's keys are
one product for all responses of a group, and nothing is gathered, padded or masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rm_gallery.modeling.attention_layout import PackLayout

# T tokens, Q queries, L keys, H heads, G key heads, D head dimension

_LEAST_TOKENS = 32  # for each call: with shorter texts, masks over whole groups cost less than so many calls


def suits(layout: PackLayout, window: int | None) -> bool:
    """Whether the texts are long enough, and no sliding window ends within one."""
    num_calls = len(layout.tails) + 2 * len(layout.lengths)
    is_worth_it = int(layout.lengths.sum()) >= _LEAST_TOKENS * num_calls
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
