"""FlexAttention: the visibility rule as a mask function, and the map of blocks that are not empty.

Example with BLOCK = 2 and one group, prefix [a b] and responses [c d] and [e f]: blocks of queries (rows) and keys.

           ab  cd  ef
    ab     p   .   .      p: partial, the mask function is evaluated (causal inside a part)
    cd     f   p   .      f: full, every query sees every key
    ef     f   .   p      .: empty, skipped
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rm_gallery.modeling.attention.layout import AttentionSpec, PackLayout, Reach

# T tokens, padded to whole blocks; M blocks; H query heads, H_kv key heads, D head dimension

BLOCK = 128
"""Queries and keys of a block: the kernel's tile."""


def block_mask(packed: PackLayout, reach: Reach) -> Any:
    """The BlockMask of a layout, built on the host: `create_block_mask` evaluates all T x T pairs on the device."""
    from torch.nn.attention.flex_attention import BlockMask

    window, chunk = reach
    partial, full = block_map(packed, window or chunk)
    # Padding tokens are a group of their own, -2, which sees itself: a row without keys would give NaN.
    labels = packed.host_labels
    rest = len(partial) * BLOCK - len(labels)
    padded = np.concatenate([labels, np.stack([np.full(rest, -2), np.full(rest, -2), np.arange(rest)], -1)])
    # First visible position of each query, as data: a Python number for the window would be compiled into the kernel.
    first = np.zeros(len(padded), np.int64) if window is None else padded[:, 2] - window + 1
    if chunk is not None:
        first = np.maximum(first, padded[:, 2] // chunk * chunk)
    group, response, position, begin = (packed.to_device(each.astype(np.int32)) for each in (*padded.T, first))

    def is_visible(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (group[q] == group[k]) & (position[k] <= position[q]) & (position[k] >= begin[q])
        return seen & ((response[k] == -1) | (response[k] == response[q]))

    num_partial, which_partial, num_full, which_full = (
        packed.to_device(each) for blocks in (partial, full) for each in _block_indices(blocks)
    )
    return BlockMask.from_kv_blocks(
        num_partial, which_partial, num_full, which_full,
        BLOCK_SIZE=BLOCK, mask_mod=is_visible, seq_lengths=(len(padded), len(padded)),
    )  # fmt: skip


def block_map(packed: PackLayout, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """bool [M, M] each, by query block and key block: (partly visible, fully visible).

    Example: one text of 300 tokens is 3 blocks, tokens 0-127, 128-255 and 256-299 with padding. The diagonal is partial
    (causal), blocks (1, 0) and (2, 0), (2, 1): every query sees every key in (1, 0), which is full; block 2 contains
    padding queries, which see none of the text, so (2, 0) and (2, 1) are partial:

        partial  1 0 0     full  0 0 0
                 0 1 0           1 0 0
                 1 1 1           0 0 0

    window: of the layer, or its chunk. With one no block counts as full, and some partial blocks may hold no visible
    pair: both cost time, not correctness.
    """
    num_blocks = max(1, -(-int(packed.lengths.sum()) // BLOCK))
    some = np.eye(num_blocks, dtype=bool)  # padding sees itself
    full = np.zeros((num_blocks, num_blocks), bool)
    for start, length in zip(packed.starts, packed.prefixes, strict=True):
        _mark(some, full, start, length, start, length)
    prefixes = zip(packed.starts[packed.tail_groups], packed.prefixes[packed.tail_groups], strict=True)
    for start, length, (prefix_start, prefix_length) in zip(packed.tail_starts, packed.tails, prefixes, strict=True):
        _mark(some, full, start, length, start, length)
        _mark(some, full, start, length, prefix_start, prefix_length)
    if window is not None:
        full[:] = False
    return np.tril(some) & ~full, full


def _mark(some: np.ndarray, full: np.ndarray, q_start: int, q_length: int, k_start: int, k_length: int) -> None:
    """Mark the blocks of a run of queries over a run of keys: the same run (causal), or a prefix (all visible)."""
    if not q_length or not k_length:
        return
    some[_touched(q_start, q_length), _touched(k_start, k_length)] = True
    rows, columns = _covered(q_start, q_length), _covered(k_start, k_length)
    if q_start != k_start:
        full[rows, columns] = True
    else:
        for row in range(rows.start, rows.stop):
            full[row, columns.start : row] = True


def _touched(start: int, length: int) -> slice:
    """Blocks with at least one of these tokens: 200 tokens from 100 touch blocks 0, 1 and 2."""
    return slice(int(start // BLOCK), int(-(-(start + length) // BLOCK)))


def _covered(start: int, length: int) -> slice:
    """Blocks with these tokens only: 200 tokens from 100 cover block 1."""
    first = int(-(-start // BLOCK))
    return slice(first, max(first, int((start + length) // BLOCK)))


def _block_indices(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[1, 1, M] int32 number of marked blocks of each row, and [1, 1, M, M] int32 their columns, then the others."""
    which = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    return blocks.sum(1).astype(np.int32)[None, None], which[None, None]


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: PackLayout, spec: AttentionSpec, *, rewards_only: bool = False
) -> Tensor:
    """query: [T, H, D]; key, value: [T, H_kv, D]. Returns [T, H, D]."""
    assert not rewards_only
    mask = packed.cached(("block mask", spec.reach), lambda: block_mask(packed, spec.reach))
    num_tokens = len(query)
    rest = mask.seq_lengths[0] - num_tokens
    q, k, v = (
        torch.nn.functional.pad(part, (0, 0, 0, 0, 0, rest)).transpose(0, 1).unsqueeze(0)
        for part in (query, key, value)
    )  # each [1, heads, T, D]
    options: dict[str, Any] = {"block_mask": mask, "scale": spec.scaling, "enable_gqa": True}
    if spec.softcap is not None:
        options["score_mod"] = _soft_cap(spec.softcap)
    kernel = _kernel(query.device.type)
    if spec.sinks is None:
        out = kernel(q, k, v, **options)
    else:  # the keys have the share e^s / (e^s + e^sink) of a softmax that includes the sink; s: their log-sum-exp
        out, log_sum = kernel(q, k, v, **options, return_lse=True)
        share = (log_sum - spec.sinks.to(log_sum.dtype)[:, None]).sigmoid()  # [1, H, T]
        out = out * share.unsqueeze(-1).to(out.dtype)
    whole: Tensor = out[0].transpose(0, 1)[:num_tokens]
    return whole


@lru_cache(maxsize=8)
def _soft_cap(softcap: float) -> Callable[..., Tensor]:
    """The function on scores, one object for each soft cap, so that the kernel is compiled once."""

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@lru_cache(maxsize=2)
def _kernel(device: str) -> Callable[..., Any]:
    """Compiled on a GPU, once for all lengths. On a CPU it runs uncompiled, forward only."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    kernel: Callable[..., Any] = torch.compile(flex, dynamic=True) if device == "cuda" else flex  # type: ignore[assignment]
    return kernel


def is_available() -> bool:
    """Whether it can train here: it needs a GPU and triton."""
    from torch.utils._triton import has_triton

    return torch.cuda.is_available() and has_triton()
