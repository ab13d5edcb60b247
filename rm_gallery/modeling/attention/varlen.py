"""Attention by variable-length FlashAttention: each prefix and each response is a sequence.

Queries stay where they are in the pack; only keys and values are gathered, so that each response's own keys follow a
copy of its prefix's. A causal mask aligned to the bottom right (the last query sees all keys) then is the visibility
rule. Example, a prefix [a b] with responses [c d] and [e]:

    queries    a b | c d     | e          in pack order
    keys       a b | a b c d | a b e      gathered

    cu_seqlens_q 0 2 4 5     cu_seqlens_k 0 2 6 9

Query c is the first of two queries over four keys: it sees all but the last, which is a b c.

Backward, a prefix key has several copies: key a is at the gathered rows 0, 2 and 6. `own_keys` [0, 1, 4, 5, 8] is each
token's row in its own sequence, and `prefix_copies` lists the others by response: ([0, 1], [2, 3]) for the first
response of each group, ([0, 1], [6, 7]) for the second. The gradient of a is g[0] + g[2] + g[6], summed in this order
in float32.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rm_gallery.modeling.attention.layout import AttentionSpec, PackLayout, ranges

# T tokens, S gathered keys, N sequences, H query heads, H_kv key heads, D head dimension

FlashCall: TypeAlias = Callable[..., Tensor]
"""(query [T, H, D], keys [S, H_kv, D], values [S, H_kv, D], sequences, scaling, window) -> [T, H, D].

Takes a soft cap as a seventh argument where `takes_softcap`.
"""


@dataclass(frozen=True)
class Sequences:
    """The sequences of a pack; built once, shared by all layers."""

    cu_seqlens_q: Tensor
    """[N + 1] int32 cumulative numbers of queries."""
    cu_seqlens_k: Tensor
    """[N + 1] int32 cumulative numbers of gathered keys."""
    max_seqlen_q: int
    max_seqlen_k: int
    key_tokens: Tensor
    """[S] int64 token of each gathered key."""
    own_keys: Tensor
    """[T] int64 gathered key of each token in its own sequence."""
    prefix_copies: list[tuple[Tensor, Tensor]]
    """(prefix tokens, their gathered keys) in the first response of each group, then in the second, and so on."""


def make_sequences(packed: PackLayout) -> Sequences:
    """The sequences of a layout; empty ones are dropped.

    The comments follow the example of the module: prefixes [2], tails [2, 1].
    """
    prefixes, tails, groups = packed.prefixes, packed.tails, packed.tail_groups
    first = np.cumsum(packed.num_tails) - packed.num_tails  # [G] responses before each group
    number = np.arange(len(tails)) - first[groups]  # [R] index of a response in its group: 0 1
    # 1. Sequences in pack order: a group's prefix, then its responses. Half a token breaks the tie between an empty
    #    prefix and the response that begins at the same token.
    order = np.argsort(np.concatenate([packed.starts, packed.tail_starts + 0.5]), kind="stable")
    query_lengths = np.concatenate([prefixes, tails])[order]  # 2 2 1
    prefix_lengths = np.concatenate([np.zeros_like(prefixes), prefixes[groups]])[order]  # 0 2 2
    prefix_starts = np.concatenate([packed.starts, packed.starts[groups]])[order]  # 0 0 0
    numbers = np.concatenate([np.full_like(prefixes, -1), number])[order]  # -1 0 1
    is_there = query_lengths > 0
    query_lengths, prefix_lengths, prefix_starts, numbers = (
        each[is_there] for each in (query_lengths, prefix_lengths, prefix_starts, numbers)
    )
    # 2. Keys: a copy of the prefix, then the sequence's own.
    key_lengths = prefix_lengths + query_lengths  # 2 4 3
    key_starts = np.cumsum(key_lengths) - key_lengths  # 0 2 6
    query_starts = np.cumsum(query_lengths) - query_lengths  # 0 2 4
    key_tokens = np.empty(int(key_lengths.sum()), np.int64)
    own_keys = ranges(key_starts + prefix_lengths, query_lengths)  # 0 1 | 4 5 | 8
    key_tokens[own_keys] = ranges(query_starts, query_lengths)
    # 3. Copies by the index of the response: inside one of these no token occurs twice, so the backward pass can add
    #    each in one deterministic index_add.
    copies = []
    for each in range(int(numbers.max()) + 1):
        mine = (numbers == each) & (prefix_lengths > 0)
        if not mine.any():
            continue
        copied_keys = ranges(key_starts[mine], prefix_lengths[mine])  # 2 3, then 6 7
        key_tokens[copied_keys] = ranges(prefix_starts[mine], prefix_lengths[mine])  # 0 1, then 0 1
        copies.append((packed.to_device(key_tokens[copied_keys]), packed.to_device(copied_keys)))
    return Sequences(
        packed.to_device(_cumulative(query_lengths)),
        packed.to_device(_cumulative(key_lengths)),
        int(query_lengths.max()),
        int(key_lengths.max()),
        packed.to_device(key_tokens),
        packed.to_device(own_keys),
        copies,
    )


def _cumulative(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: PackLayout, spec: AttentionSpec, *, rewards_only: bool = False,
    flash: FlashCall | None = None,
) -> Tensor:  # fmt: skip
    """query: [T, H, D]; key, value: [T, H_kv, D]. flash: the kernel; None for `find_flash`'s. Returns [T, H, D]."""
    flash = flash or find_flash()
    assert flash is not None and not rewards_only
    sequences = packed.cached("sequences", lambda: make_sequences(packed))
    keys, values = (_Gather.apply(part, sequences) for part in (key, value))
    more = () if spec.softcap is None else (spec.softcap,)
    return flash(query.contiguous(), keys, values, sequences, spec.scaling, spec.window, *more)


class _Gather(torch.autograd.Function):
    """[T, H_kv, D] -> [S, H_kv, D]. Backward sums the gradients of a token's copies in float32, in a fixed order."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, sequences: Sequences) -> Tensor:
        ctx.sequences = sequences
        return part.index_select(0, sequences.key_tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        total = gradient.index_select(0, ctx.sequences.own_keys).float()
        for tokens, copied_keys in ctx.sequences.prefix_copies:
            total.index_add_(0, tokens, gradient.index_select(0, copied_keys).float())
        return total.to(gradient.dtype), None


@lru_cache(maxsize=1)
def find_flash() -> FlashCall | None:
    """The flash-attn package's kernel if it is installed, else torch's; None if neither runs here."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return None
    for make in (_from_flash_attn, _from_torch):
        flash = make()
        if flash is not None and _is_aligned_bottom_right(flash):
            return flash
    return None


def _from_flash_attn() -> FlashCall | None:
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None

    def call(
        q: Tensor, k: Tensor, v: Tensor, s: Sequences, scaling: float, window: int | None, softcap: float | None = None
    ) -> Tensor:
        left = -1 if window is None else window - 1
        more = {} if softcap is None else {"softcap": softcap}
        out: Tensor = flash_attn_varlen_func(
            q, k, v, s.cu_seqlens_q, s.cu_seqlens_k, s.max_seqlen_q, s.max_seqlen_k,
            softmax_scale=scaling, causal=True, window_size=(left, -1 if window is None else 0), **more,
        )  # fmt: skip
        return out

    return call


def _from_torch() -> FlashCall | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if "window_size" not in parameters:  # torch before 2.11
        return None
    takes_gqa = "enable_gqa" in parameters

    def call(q: Tensor, k: Tensor, v: Tensor, s: Sequences, scaling: float, window: int | None) -> Tensor:
        options: dict[str, Any] = {"enable_gqa": True} if takes_gqa else {}
        if not takes_gqa:
            k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
        left = -1 if window is None else window - 1
        out = varlen_attn(
            q, k, v, s.cu_seqlens_q, s.cu_seqlens_k, s.max_seqlen_q, s.max_seqlen_k,
            scale=scaling, window_size=(left, 0), **options,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    return call


@lru_cache(maxsize=1)
def takes_softcap() -> bool:
    """Whether `find_flash`'s kernel has soft caps: that of flash-attn 2.6 and newer, not torch's. Measured."""
    flash = find_flash()
    # Scores 0 and 64, with the soft cap 1: 0 and 1.
    return flash is not None and abs(_one_query(flash, 1.0, 1.0) - (1 + 3 * math.e) / (1 + math.e)) < 0.05


def _is_aligned_bottom_right(flash: FlashCall) -> bool:
    """Whether the last of fewer queries sees all keys; measured, since kernel versions differ in this."""
    return _one_query(flash, 0.0) == 2.0


def _one_query(flash: FlashCall, size: float, *more: float) -> float:
    """Attention of a query of ones over keys of zeros and of `size`, with the values 1 and 3; NaN if it does not run.

    more: further arguments of `flash`.
    """
    device = torch.device("cuda")
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    one_query, two_keys = (torch.tensor([0, length], dtype=torch.int32, device=device) for length in (1, 2))
    sequences = Sequences(one_query, two_keys, 1, 2, empty, empty, [])
    query = torch.ones(1, 1, 64, dtype=torch.bfloat16, device=device)
    keys = torch.stack([torch.zeros_like(query[0]), torch.full_like(query[0], size)])
    values = torch.tensor([1.0, 3.0], dtype=torch.bfloat16, device=device)[:, None, None].expand(2, 1, 64).contiguous()
    try:
        with torch.no_grad():
            found = flash(query, keys, values, sequences, 1.0, None, *more)
    except (RuntimeError, TypeError):  # no kernel for this GPU, or another signature
        return math.nan
    return float(found.mean())
