"""Variable-length flash attention: prefixes and responses are sequences; a response also has its prefix's keys.

Queries stay in the order of the pack; keys and values are gathered. A causal mask aligned to the bottom right then
equals the visibility rule. Example, a prefix [a b] with the responses [c d] and [e] (tokens 0 to 4):

    queries    a b | c d     | e          query_ends [0, 2, 4, 5]
    keys       a b | a b c d | a b e      key_ends   [0, 2, 6, 9]
    tokens     0 1 | 0 1 2 3 | 0 1 4      gathered rows of key and value

In the backward pass a prefix key has several copies: a is at the gathered rows 0, 2 and 6. `own` [0, 1, 4, 5, 8] is
each token's row in its own sequence, and `copies` lists the rest by response: ([0, 1], [2, 3]) for the first response
of each group and ([0, 1], [6, 7]) for the second. The gradient of a is g[0] + g[2] + g[6], summed in this order in
float32.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rm_gallery.modeling.attention.layout import PackLayout, ranges

# T tokens, S gathered keys, N sequences, H heads, G key heads, D head dimension

FlashCall: TypeAlias = Callable[["Tensor", "Tensor", "Tensor", "Sequences", float, "int | None"], Tensor]
"""(query [T, H, D], keys [S, G, D], values [S, G, D], sequences, scaling, window) -> [T, H, D]."""


@dataclass(frozen=True)
class Sequences:
    """The sequences of a pack, shared by all layers."""

    query_ends: Tensor
    """[N + 1] int32: cumulative number of queries, starting with 0."""
    key_ends: Tensor
    """[N + 1] int32: cumulative number of gathered keys, starting with 0."""
    max_queries: int
    max_keys: int
    tokens: Tensor
    """[S] int64: the token of each gathered key."""
    own: Tensor
    """[T] int64: the gathered row of each token in its own sequence."""
    copies: list[tuple[Tensor, Tensor]]
    """(prefix tokens, their gathered rows) for the first response of every group, for the second, and so on."""


def split_sequences(packed: PackLayout) -> Sequences:
    """The sequences of a layout; empty ones are skipped."""
    prefixes, tails, groups = packed.prefixes, packed.tails, packed.tail_groups
    first = np.cumsum(packed.num_tails) - packed.num_tails  # [G] index of the first response of each group
    number = np.arange(len(tails)) - first[groups]  # [R] index of a response in its group
    # Sequences in the order of the pack: a group's prefix, then its responses.
    order = np.argsort(np.concatenate([packed.starts, packed.tail_starts + 0.5]), kind="stable")
    query_lengths = np.concatenate([prefixes, tails])[order]
    prefix_lengths = np.concatenate([np.zeros_like(prefixes), prefixes[groups]])[order]
    prefix_starts = np.concatenate([packed.starts, packed.starts[groups]])[order]
    numbers = np.concatenate([np.full_like(prefixes, -1), number])[order]
    is_nonempty = query_lengths > 0
    query_lengths, prefix_lengths, prefix_starts, numbers = (
        each[is_nonempty] for each in (query_lengths, prefix_lengths, prefix_starts, numbers)
    )
    # A sequence's gathered keys: first those of its prefix, then its own.
    key_lengths = prefix_lengths + query_lengths
    key_starts = np.cumsum(key_lengths) - key_lengths
    query_starts = np.cumsum(query_lengths) - query_lengths
    tokens = np.empty(int(key_lengths.sum()), np.int64)
    own = ranges(key_starts + prefix_lengths, query_lengths)
    tokens[own] = ranges(query_starts, query_lengths)
    # The copies of prefixes. A prefix is copied at most once per entry, so entries contain no duplicate tokens.
    copies = []
    for each in range(int(numbers.max()) + 1):
        mine = (numbers == each) & (prefix_lengths > 0)
        if not mine.any():
            continue
        places = ranges(key_starts[mine], prefix_lengths[mine])
        tokens[places] = ranges(prefix_starts[mine], prefix_lengths[mine])
        copies.append((packed.put(tokens[places]), packed.put(places)))
    return Sequences(
        packed.put(_ends(query_lengths)),
        packed.put(_ends(key_lengths)),
        int(query_lengths.max()),
        int(key_lengths.max()),
        packed.put(tokens),
        packed.put(own),
        copies,
    )


def _ends(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, *, scaling: float, window: int | None,
    flash: FlashCall,
) -> Tensor:  # fmt: skip
    """query: [T, H, D]; key, value: [T, G, D]; flash: the kernel, see `find_flash`. Returns [T, H, D]."""
    keys, values = (_Gather.apply(part, sequences) for part in (key, value))
    return flash(query.contiguous(), keys, values, sequences, scaling, window)


class _Gather(torch.autograd.Function):
    """[T, G, D] -> [S, G, D]; gradients of the copies of a token are summed in float32, in a fixed order."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, sequences: Sequences) -> Tensor:
        ctx.sequences = sequences
        return part.index_select(0, sequences.tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        total = gradient.index_select(0, ctx.sequences.own).float()
        # Tokens are unique within one entry, so index_add_ is deterministic.
        for tokens, places in ctx.sequences.copies:
            total.index_add_(0, tokens, gradient.index_select(0, places).float())
        return total.to(gradient.dtype), None


@lru_cache(maxsize=1)
def find_flash() -> FlashCall | None:
    """The kernel of the flash-attn package if installed, else torch's; None if neither is usable on this GPU."""
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

    def call(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scaling: float, window: int | None) -> Tensor:
        left = -1 if window is None else window - 1
        out: Tensor = flash_attn_varlen_func(
            q, k, v, sequences.query_ends, sequences.key_ends, sequences.max_queries, sequences.max_keys,
            softmax_scale=scaling, causal=True, window_size=(left, -1 if window is None else 0),
        )  # fmt: skip
        return out

    return call


def _from_torch() -> FlashCall | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known:  # torch before 2.11
        return None
    shares_key_heads = "enable_gqa" in known

    def call(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scaling: float, window: int | None) -> Tensor:
        options: dict[str, Any] = {"enable_gqa": True} if shares_key_heads else {}
        if not shares_key_heads:
            k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
        left = -1 if window is None else window - 1
        out = varlen_attn(
            q, k, v, sequences.query_ends, sequences.key_ends, sequences.max_queries, sequences.max_keys,
            scale=scaling, window_size=(left, 0), **options,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    return call


def _is_aligned_bottom_right(flash: FlashCall) -> bool:
    """Whether the last query sees all keys when there are fewer queries than keys; kernels differ in this alignment."""
    device = torch.device("cuda")
    zero = torch.zeros(0, dtype=torch.int64, device=device)
    one_query, two_keys = (torch.tensor([0, length], dtype=torch.int32, device=device) for length in (1, 2))
    one = Sequences(one_query, two_keys, 1, 2, zero, zero, [])
    query = torch.zeros(1, 1, 64, dtype=torch.bfloat16, device=device)
    values = torch.tensor([1.0, 3.0], dtype=torch.bfloat16, device=device)[:, None, None].expand(2, 1, 64).contiguous()
    try:
        with torch.no_grad():
            found = flash(query, torch.zeros_like(values), values, one, 1.0, None)
    except (RuntimeError, TypeError):  # no kernel for this GPU, or a different signature
        return False
    return bool((found == 2.0).all())
