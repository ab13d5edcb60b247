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

from rm_gallery.modeling.attention.layout import PackLayout

# T tokens, padded to whole blocks; M blocks; H heads, G key heads, D head dimension

BLOCK = 128
"""Tokens per block of queries or keys."""


def block_mask(packed: PackLayout, window: int | None) -> Any:
    """The BlockMask of a layout. It is computed on the host: `create_block_mask` evaluates all T x T pairs."""
    from torch.nn.attention.flex_attention import BlockMask

    partial, full = block_map(packed, window)
    labels = packed.host_labels
    rest = len(partial) * BLOCK - len(labels)
    filled = np.concatenate([labels, np.stack([np.full(rest, -2), np.full(rest, -2), np.arange(rest)], -1)])
    # The first visible position is a tensor too: a Python number would be compiled into the kernel.
    first = np.zeros(len(filled)) if window is None else filled[:, 2] - window + 1
    group, response, position, reach = (packed.put(each.astype(np.int32)) for each in (*filled.T, first))

    def rule(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (group[q] == group[k]) & (position[k] <= position[q]) & (position[k] >= reach[q])
        return seen & ((response[k] == -1) | (response[k] == response[q]))

    num_partial, which_partial, num_full, which_full = (
        packed.put(each) for blocks in (partial, full) for each in _listed(blocks)
    )
    return BlockMask.from_kv_blocks(
        num_partial, which_partial, num_full, which_full,
        BLOCK_SIZE=BLOCK, mask_mod=rule, seq_lengths=(len(filled), len(filled)),
    )  # fmt: skip


def block_map(packed: PackLayout, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(partial, full), bool [M, M] each: blocks with some visible pair, and blocks in which every query sees every key.

    With a window no block is full, and blocks outside the window may be listed as partial.
    """
    # Queries of a part see the part itself (causal) and, in a response, all of its prefix. Mark both kinds of blocks.
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
    """Mark the blocks of one part's queries and another part's keys: the same part (causal), or its prefix (full)."""
    if not q_length or not k_length:
        return
    some[_touched(q_start, q_length), _touched(k_start, k_length)] = True
    rows, columns = _inside(q_start, q_length), _inside(k_start, k_length)
    if q_start != k_start:
        full[rows, columns] = True
    else:
        for row in range(rows.start, rows.stop):
            full[row, columns.start : row] = True


def _touched(start: int, length: int) -> slice:
    return slice(int(start // BLOCK), int(-(-(start + length) // BLOCK)))


def _inside(start: int, length: int) -> slice:
    """Blocks that consist of these tokens only."""
    first = int(-(-start // BLOCK))
    return slice(first, max(first, int((start + length) // BLOCK)))


def _listed(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[1, 1, M] int32 number of blocks per row, and [1, 1, M, M] int32 their indices, the others after them."""
    which = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    return blocks.sum(1).astype(np.int32)[None, None], which[None, None]


def flex_attention(query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float) -> Tensor:
    """query: [T, H, D]; key, value: [T, G, D]; mask: see `block_mask`. Returns [T, H, D]."""
    num_tokens = len(query)
    rest = mask.seq_lengths[0] - num_tokens
    q, k, v = (
        torch.nn.functional.pad(part, (0, 0, 0, 0, 0, rest)).transpose(0, 1).unsqueeze(0)
        for part in (query, key, value)
    )  # each [1, heads, T, D]
    out: Tensor = _kernel(query.device.type)(q, k, v, block_mask=mask, scale=scaling, enable_gqa=True)
    return out[0].transpose(0, 1)[:num_tokens]


@lru_cache(maxsize=2)
def _kernel(device: str) -> Callable[..., Tensor]:
    """Compiled on a GPU, with dynamic lengths; eager on a CPU, forward only."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    kernel: Callable[..., Tensor] = torch.compile(flex, dynamic=True) if device == "cuda" else flex  # type: ignore[assignment]
    return kernel


def is_available() -> bool:
    """Whether FlexAttention can train on this machine: it needs a GPU and triton."""
    from torch.utils._triton import has_triton

    return torch.cuda.is_available() and has_triton()
