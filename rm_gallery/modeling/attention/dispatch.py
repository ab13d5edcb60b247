"""Packed attention: one visibility rule, several kernels, the choice between them, and the reference.

Query q sees key k if both are in the same group, k is not after q, and k belongs to the common prefix or to q's own
response. `install` registers packed attention with transformers' attention interface.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.errors import UserError
from rm_gallery.modeling.attention.cpu import plain_attention, split_attention, suits
from rm_gallery.modeling.attention.flex import block_mask, flex_attention
from rm_gallery.modeling.attention.flex import is_available as flex_is_available
from rm_gallery.modeling.attention.layout import PackLayout, Queries, visible
from rm_gallery.modeling.attention.varlen import find_flash, split_sequences, varlen_attention

__all__ = [
    "NAME",
    "AttentionSpec",
    "PackLayout",
    "attend",
    "check",
    "install",
    "lay_out",
    "packed_attention",
    "reference_attention",
    "visible",
]

# T tokens, N queries (T, or R in the last layer), B groups of a bucket, L its longest group, H heads, D head dimension

NAME = "rm_gallery_packed"


@dataclass(frozen=True)
class AttentionSpec:
    """Attention of one layer: what its scores are, besides query, key and the visibility rule."""

    scaling: float
    """Factor of the scores, before the softmax."""
    window: int | None = None
    """Sliding window in positions; None for full attention."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap)."""
    sinks: Tensor | None = None
    """[H] a learned score per head that takes part in the softmax without a value."""
    dropout: float = 0.0
    """Dropout rate of the attention probabilities."""

    @property
    def used(self) -> frozenset[str]:
        """Names of the optional features that are set."""
        features = {
            "window": self.window,
            "softcap": self.softcap,
            "sinks": self.sinks,
            "dropout": self.dropout or None,
        }
        return frozenset(name for name, value in features.items() if value is not None)


Run: TypeAlias = Callable[[Tensor, Tensor, Tensor, PackLayout, AttentionSpec, bool], Tensor]
"""(query [N, H, D], key and value [T, H_kv, D], layout, spec, rewards_only) -> [N, H, D]"""


@dataclass(frozen=True)
class _Kernel:
    """A kernel and what it supports."""

    run: Run
    features: frozenset[str]
    """Names of the optional fields of `AttentionSpec` that it computes."""
    needs_gpu: bool = False
    head_sizes: range = range(1, 1 << 16)

    def supports(self, spec: AttentionSpec) -> bool:
        return spec.used <= self.features


_MAX_PLAIN_TOKENS = {torch.bfloat16: 2048, torch.float32: 256}  # of the longest group of a pack, on a CPU


def lay_out(batch: PackedBatch, kernel: str = "auto") -> PackLayout:
    """The attention layout of a batch; `kernel` is the setting `model.attention`."""
    return PackLayout(batch.group_lengths, batch.tail_lengths, batch.input_ids.device, kernel)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    packed: PackLayout, scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of all tokens, with the signature of transformers' attention interface.

    query: [1, H, T, D]; key, value: [1, H_kv, T, D]. Returns [1, T, H, D].
    Raises UserError for features that no kernel supports.
    """
    spec = AttentionSpec(
        query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux, dropout
    )
    if not any(kernel.supports(spec) for kernel in _KERNELS.values()):
        raise UserError(f"{type(module).__name__}: attention with a soft cap or sinks is not supported in packed form")
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    return attend(query, key, value, packed, spec).unsqueeze(0), None


def attend(
    query: Tensor, key: Tensor, value: Tensor, packed: PackLayout, spec: AttentionSpec, *, rewards_only: bool = False
) -> Tensor:
    """Attention by the kernel that `_choose` selects.

    query: [N, H, D]; key, value: [T, H_kv, D]. rewards_only: the queries are the R reward tokens instead of all T.
    Returns [N, H, D].
    """
    if not len(query):
        return query
    return _choose(query, packed, spec, rewards_only).run(query, key, value, packed, spec, rewards_only)


def _choose(query: Tensor, packed: PackLayout, spec: AttentionSpec, rewards_only: bool) -> _Kernel:
    """The kernel for `model.attention`; for `auto`, by measurements on CPUs (docs/log.md), else the first supported."""
    name = packed.kernel
    if name == "auto" and query.device.type == "cpu":
        is_inference = query.dtype == torch.float32 and not (torch.is_grad_enabled() or rewards_only)
        if is_inference and _KERNELS["split"].supports(spec) and suits(packed, spec.window):
            return _KERNELS["split"]
        is_plain_faster = int(packed.lengths.max()) <= _MAX_PLAIN_TOKENS.get(query.dtype, 0)
        name = "plain" if is_plain_faster and _KERNELS["plain"].supports(spec) else "sdpa"
    elif name == "auto":
        fitting = (
            each for each, kernel in _KERNELS.items()
            if kernel.needs_gpu and query.shape[-1] in kernel.head_sizes and kernel.supports(spec)
        )  # fmt: skip
        name = next((each for each in fitting if _unsupported(each, query.device, query.dtype, 0.0) is None), "sdpa")
    if rewards_only and _KERNELS[name].needs_gpu:
        name = "sdpa"  # one query per response: too few for a layout of its own
    assert _KERNELS[name].supports(spec), f"{name} does not support {sorted(spec.used)}"
    return _KERNELS[name]


def check(setting: str, device: torch.device, dtype: torch.dtype, dropout: float) -> None:
    """Raise UserError for a kernel (`model.attention`) that cannot train in this dtype on this device."""
    reason = None if setting == "auto" else _unsupported(setting, device, dtype, dropout)
    if reason is not None:
        raise UserError(f"model.attention={setting}: {reason}; set auto, which selects a supported kernel")


def _unsupported(name: str, device: torch.device, dtype: torch.dtype, dropout: float) -> str | None:
    """The reason why a kernel cannot train here, or None."""
    kernel = _KERNELS[name]
    if dropout and "dropout" not in kernel.features:
        return "it does not support attention dropout, and model.dropout is not 0"
    if kernel.needs_gpu and device.type != "cuda":
        return "it needs a GPU"
    if name == "varlen":
        if dtype == torch.float32:
            return "it computes in bf16, and model.fsdp_config.model_dtype is fp32"
        if find_flash() is None:
            return "neither this torch nor a flash-attn package has a variable-length kernel for this GPU"
    if name == "flex" and not flex_is_available():
        return "it needs triton"
    return None


def _plain(
    query: Tensor, key: Tensor, value: Tensor, packed: PackLayout, spec: AttentionSpec, rewards_only: bool
) -> Tensor:
    queries = _queries(packed, rewards_only)
    return plain_attention(
        query, key, value,
        queries=[bucket.queries for bucket in queries.buckets],
        keys=[bucket.index for bucket in queries.buckets],
        query_restore=queries.restore,
        key_restore=packed.all_tokens.restore,
        biases=[queries.bias(number, spec.window, query.dtype) for number in range(len(queries.buckets))],
        scaling=spec.scaling,
    )  # fmt: skip


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, packed: PackLayout, spec: AttentionSpec, rewards_only: bool
) -> Tensor:
    """One call of torch's scaled_dot_product_attention per bucket."""
    queries = _queries(packed, rewards_only)
    repeats = query.shape[1] // key.shape[1]
    outputs = []
    for number, bucket in enumerate(queries.buckets):
        q = _rows(query, bucket.queries)
        # Key heads are repeated here: with `enable_gqa` and a mask, some GPU backends fall back to plain matrices.
        k, v = (_rows(part, bucket.index).repeat_interleave(repeats, 1) for part in (key, value))
        mask = queries.mask(number, spec.window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=spec.dropout, scale=spec.scaling)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # [B x Q, H, D]
    return torch.cat(outputs).index_select(0, queries.restore)


def _split(
    query: Tensor, key: Tensor, value: Tensor, packed: PackLayout, spec: AttentionSpec, rewards_only: bool
) -> Tensor:
    assert not rewards_only
    return split_attention(query, key, value, packed, scaling=spec.scaling)


def _rows(part: Tensor, index: Tensor) -> Tensor:
    """[rows, heads, D] -> [B, heads, L, D]"""
    return part.index_select(0, index.view(-1)).view(*index.shape, *part.shape[1:]).transpose(1, 2)


def _queries(packed: PackLayout, rewards_only: bool) -> Queries:
    if rewards_only:
        return packed.rewards
    return packed.all_tokens if torch.is_grad_enabled() else packed.by_response or packed.all_tokens


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, packed: PackLayout, spec: AttentionSpec, rewards_only: bool
) -> Tensor:
    flash = find_flash()
    assert flash is not None and not rewards_only
    sequences = packed.once("sequences", lambda: split_sequences(packed))
    return varlen_attention(query, key, value, sequences, scaling=spec.scaling, window=spec.window, flash=flash)


def _flex(
    query: Tensor, key: Tensor, value: Tensor, packed: PackLayout, spec: AttentionSpec, rewards_only: bool
) -> Tensor:
    assert not rewards_only
    mask = packed.once(("block mask", spec.window), lambda: block_mask(packed, spec.window))
    return flex_attention(query, key, value, mask, scaling=spec.scaling)


_WINDOW = frozenset({"window"})
_KERNELS = {
    "split": _Kernel(_split, _WINDOW),  # selected by `auto` only
    "plain": _Kernel(_plain, _WINDOW),
    "sdpa": _Kernel(_sdpa, _WINDOW | {"dropout"}),
    "varlen": _Kernel(_varlen, _WINDOW, needs_gpu=True, head_sizes=range(8, 257, 8)),
    "flex": _Kernel(_flex, _WINDOW, needs_gpu=True, head_sizes=range(16, 257)),
}
"""The kernels; `auto` tries those of GPUs in this order."""


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, labels: Tensor, *, scaling: float, window: int | None = None
) -> Tensor:
    """Attention by the visibility rule over all T x T pairs; the reference of all kernel tests.

    query: [H, T, D]; key, value: [H_kv, T, D]; labels: [T, 3]. Returns [T, H, D].
    """
    repeats = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
    logits = (query @ key.transpose(1, 2)) * scaling  # [H, T, T]
    logits = logits.masked_fill(~visible(labels, labels, window), float("-inf"))
    return (logits.softmax(-1) @ value).transpose(0, 1)


def install() -> None:
    """Register `attn_implementation=NAME` with transformers; calling it again changes nothing.

    No mask function is registered: the layout has the mask, and transformers builds none for a kernel without one. Its
    own would synchronize with the device to check whether positions restart.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
