"""Packs for tests of attention kernels, and the comparison with the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.data.tokenization.token_group import TokenGroup
from rm_gallery.modeling.attention.dispatch import PackLayout, lay_out, reference_attention

SHAPES: dict[str, list[tuple[int, list[int]]]] = {
    "single tokens": [(0, [1]), (1, [1]), (0, [1, 1]), (1, [1, 1, 1])],
    "empty prefixes": [(0, [5, 130]), (0, [3])],
    "many responses": [(40, [3, 7, 1, 20] * 4), (0, [2] * 16)],
    "one of each length": [(129, [1, 64]), (128, [128]), (255, [257]), (1, [300, 2])],
}
"""name -> (tokens of the prefix, tokens of each response) of each group"""
LONG_SHAPES: dict[str, list[tuple[int, list[int]]]] = {
    "8192 tokens": [(8191, [1])],
    "long responses": [(0, [4096, 4000]), (2000, [1024, 1, 700])],
    "long prefix, 16 responses": [(3000, [100] * 16)],
}
"""Too long for a CPU."""
HEADS = [(4, 4, 64), (4, 2, 64), (8, 1, 128)]
"""(heads, key heads, head dimension)"""
SHAPES_AND_HEADS = [
    pytest.param(shape, heads, id=f"{shape}-{heads}", marks=() if (row + column) % 3 == 0 else pytest.mark.slow)
    for row, shape in enumerate(SHAPES)
    for column, heads in enumerate(HEADS)
]
"""All combinations; `make test` runs every shape and every number of heads at least once."""


def layout_of(shape: Sequence[tuple[int, list[int]]], device: torch.device, kernel: str = "auto") -> PackLayout:
    groups = [
        TokenGroup(np.zeros(prefix, np.int32), [np.zeros(tail, np.int32) for tail in tails], ())
        for prefix, tails in shape
    ]
    return lay_out(collate(groups).to(device), kernel)


def draw_inputs(
    num_tokens: int, heads: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Query [T, H, D], key and value [T, G, D], and the gradient of the output."""
    num_heads, key_heads, size = heads
    draw = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(num_tokens, count, size, generator=draw).to(device, dtype)
        for count in (num_heads, key_heads, key_heads, num_heads)
    ]
    return parts[:3], parts[3]


def worst_difference(
    run: Callable[..., Tensor], layout: PackLayout, heads: tuple[int, int, int], dtype: torch.dtype, *,
    window: int | None = None, backward: bool = True,
) -> float:  # fmt: skip
    """Largest error against the float32 reference, of output and gradients, relative to each one's maximum.

    run: (query, key, value, scaling) -> [T, H, D].
    """
    inputs, gradient = draw_inputs(len(layout.labels), heads, layout.device, dtype)
    rounded = [part.clone().requires_grad_(backward) for part in inputs]
    exact = [part.float().requires_grad_(backward) for part in inputs]
    found = run(*rounded, 0.1)
    wanted = reference_attention(*(part.transpose(0, 1) for part in exact), layout.labels, scaling=0.1, window=window)
    pairs = [(found, wanted)]
    if backward:
        pairs += zip(torch.autograd.grad(found, rounded, gradient),
                     torch.autograd.grad(wanted, exact, gradient.float()), strict=True)  # fmt: skip
    shares = [
        (mine.detach().float() - theirs.detach()).abs().max() / theirs.detach().abs().max() for mine, theirs in pairs
    ]
    return float(torch.stack(shares).max())
