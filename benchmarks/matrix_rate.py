"""The rate of matrix products on this machine, and how many operations a pack needs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

_SHAPES = ((4096, 512, 1536), (4096, 1536, 512), (4096, 512, 512), (1536, 4096, 512))  # rows, inner, columns


def matrix_rate(dtype: str, *, seconds: float = 1.0) -> float:
    """Operations a second of products with the shapes of the 25M model's layers, all threads of this process."""
    import torch

    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    factors = [(torch.randn(m, k).to(kind), torch.randn(k, n).to(kind)) for m, k, n in _SHAPES]
    operations = 2 * sum(m * k * n for m, k, n in _SHAPES)
    for a, b in factors:
        a @ b
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for a, b in factors:
            a @ b
        count += 1
    return operations * count / (time.perf_counter() - start)


def operations(config: Any, group_lengths: Sequence[int], tail_lengths: Sequence[Sequence[int]]) -> float:
    """Operations of forward and backward pass over a pack: products with weights, and attention over visible keys.

    Three times the forward pass, 2 for each weight and token (Kaplan et al. 2020, section 2.1), 4 for each query width
    and visible key. In the last layer keys and values are needed of all tokens, the rest of the R reward tokens only.
    """
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    keys_values = 2 * hidden * config.num_key_value_heads * size
    rest = 2 * hidden * heads * size + 3 * hidden * inner
    tokens, rewards = sum(group_lengths), sum(map(len, tail_lengths))
    seen = seen_last = 0
    for length, tails in zip(group_lengths, tail_lengths, strict=True):
        prefix = length - sum(tails)
        seen += prefix * (prefix + 1) // 2 + sum(tail * prefix + tail * (tail + 1) // 2 for tail in tails)
        seen_last += sum(prefix + tail for tail in tails)
    layers = config.num_hidden_layers
    products = 2 * (layers * keys_values * tokens + rest * ((layers - 1) * tokens + rewards))
    attention = 4 * heads * size * ((layers - 1) * seen + seen_last)
    return 3.0 * (products + attention)
