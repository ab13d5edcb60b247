"""Attention over packed groups: the kernels, the choice between them, and the rule written out as a reference.

Token q sees key k when both are in the same group, k is not after q, and k belongs to the common prefix or to q's
own response. `install` registers this with transformers' attention interface, so model code stays the library's.
"""

from __future__ import annotations

from collections.abc import Callable
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
from rm_gallery.modeling.attention.varlen import cut, find_flash, varlen_attention

__all__ = [
    "NAME",
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
Kernel: TypeAlias = Callable[..., Tensor]
"""(query, key, value, layout, rewards_only, scaling, window, dropout) -> [N, H, D]"""
_PLAIN_UP_TO = {torch.bfloat16: 2048, torch.float32: 256}  # tokens of a pack's longest group


def lay_out(batch: PackedBatch, kernel: str = "auto") -> PackLayout:
    """What attention needs to know of a batch; `kernel` is the setting `model.attention`."""
    return PackLayout(batch.group_lengths, batch.tail_lengths, batch.input_ids.device, kernel)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    packed: PackLayout, scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of all tokens, with the signature of transformers' interface.

    query: [1, H, T, D]; key, value: [1, H_kv, T, D]. Returns [1, T, H, D].
    """
    if softcap is not None or s_aux is not None:
        raise UserError(f"{type(module).__name__}: attention with a soft cap or sinks is not supported in packed form")
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, packed, scaling=scaling, window=sliding_window, dropout=dropout).unsqueeze(0), None


def attend(
    query: Tensor, key: Tensor, value: Tensor, packed: PackLayout, *, scaling: float, rewards_only: bool = False,
    window: int | None = None, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """Attention by the kernel that suits.

    query: [N, H, D]; key, value: [T, H_kv, D]. rewards_only: the N queries are those of the R reward tokens, else of
    all T. window: of this layer, in tokens. Returns [N, H, D].
    """
    if not len(query):
        return query
    kernel = _choose(query, packed, dropout, rewards_only, window)
    return kernel(query, key, value, packed, rewards_only, scaling, window, dropout)


def _choose(query: Tensor, packed: PackLayout, dropout: float, rewards_only: bool, window: int | None) -> Kernel:
    """`auto`: by measurement on a CPU (docs/log.md); on a GPU the first kernel that knows the case."""
    name, on_cpu = packed.kernel, query.device.type == "cpu"
    if name == "auto" and on_cpu:
        is_plain_scoring = query.dtype == torch.float32 and not (torch.is_grad_enabled() or dropout or rewards_only)
        if is_plain_scoring and suits(packed, window):
            return _split
        is_plain_faster = int(packed.lengths.max()) <= _PLAIN_UP_TO.get(query.dtype, 0)
        name = "plain" if is_plain_faster and not dropout else "sdpa"
    elif name == "auto":
        known = [each for each in _ON_GPU if query.shape[-1] in _HEAD_SIZES[each]]
        name = next((each for each in known if _why_not(each, query.device, query.dtype, dropout) is None), "sdpa")
    if rewards_only and name in _ON_GPU:
        name = "sdpa"  # one query for each response: not worth a layout of its own
    return _KERNELS[name]


def check(setting: str, device: torch.device, dtype: torch.dtype, dropout: float) -> None:
    """Raise UserError for a kernel (`model.attention`) that cannot train in this type on this device."""
    reason = None if setting == "auto" else _why_not(setting, device, dtype, dropout)
    if reason is not None:
        raise UserError(f"model.attention={setting}: {reason}; set auto, which takes what runs here")


def _why_not(name: str, device: torch.device, dtype: torch.dtype, dropout: float) -> str | None:
    """Why a kernel cannot train here; None if it can."""
    if name == "sdpa":
        return None
    if dropout:
        return "it knows no attention dropout, and model.dropout is not 0"
    if name in _ON_GPU and device.type != "cuda":
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
    query: Tensor, key: Tensor, value: Tensor, packed: PackLayout, rewards_only: bool, scaling: float,
    window: int | None, dropout: float,
) -> Tensor:  # fmt: skip
    asked = _asked(packed, rewards_only)
    return plain_attention(
        query, key, value,
        queries=[bucket.queries for bucket in asked.buckets],
        keys=[bucket.index for bucket in asked.buckets],
        query_restore=asked.restore,
        key_restore=packed.all_tokens.restore,
        biases=[asked.bias(number, window, query.dtype) for number in range(len(asked.buckets))],
        scaling=scaling,
    )  # fmt: skip


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, packed: PackLayout, rewards_only: bool, scaling: float,
    window: int | None, dropout: float,
) -> Tensor:  # fmt: skip
    """One call of torch's scaled-dot-product attention for each bucket."""
    asked = _asked(packed, rewards_only)
    repeats = query.shape[1] // key.shape[1]
    outputs = []
    for number, bucket in enumerate(asked.buckets):
        q = _rows(query, bucket.queries)
        # Key heads are repeated by hand: with `enable_gqa` and a mask, some GPU back ends fall back to plain matrices.
        k, v = (_rows(part, bucket.index).repeat_interleave(repeats, 1) for part in (key, value))
        mask = asked.mask(number, window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # [B x Q, H, D]
    return torch.cat(outputs).index_select(0, asked.restore)


def _split(
    query: Tensor, key: Tensor, value: Tensor, packed: PackLayout, rewards_only: bool, scaling: float,
    window: int | None, dropout: float,
) -> Tensor:  # fmt: skip
    assert not (rewards_only or dropout)
    return split_attention(query, key, value, packed, scaling=scaling)


def _rows(part: Tensor, index: Tensor) -> Tensor:
    """[rows, heads, D] -> [B, heads, L, D]"""
    return part.index_select(0, index.view(-1)).view(*index.shape, *part.shape[1:]).transpose(1, 2)


def _asked(packed: PackLayout, rewards_only: bool) -> Queries:
    if rewards_only:
        return packed.rewards
    return packed.all_tokens if torch.is_grad_enabled() else packed.by_response or packed.all_tokens


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, packed: PackLayout, rewards_only: bool, scaling: float,
    window: int | None, dropout: float,
) -> Tensor:  # fmt: skip
    flash = find_flash()
    assert flash is not None and not rewards_only
    sequences = packed.once("sequences", lambda: cut(packed))
    return varlen_attention(query, key, value, sequences, scaling=scaling, window=window, flash=flash)


def _flex(
    query: Tensor, key: Tensor, value: Tensor, packed: PackLayout, rewards_only: bool, scaling: float,
    window: int | None, dropout: float,
) -> Tensor:  # fmt: skip
    assert not rewards_only
    mask = packed.once(("block mask", window), lambda: block_mask(packed, window))
    return flex_attention(query, key, value, mask, scaling=scaling)


_KERNELS: dict[str, Kernel] = {"plain": _plain, "sdpa": _sdpa, "varlen": _varlen, "flex": _flex}
_ON_GPU = ("varlen", "flex")  # in the order in which `auto` tries them
_HEAD_SIZES = {"varlen": range(8, 257, 8), "flex": range(16, 257)}


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, labels: Tensor, *, scaling: float, window: int | None = None
) -> Tensor:
    """The rule written out over all T x T pairs; what every kernel is tested against.

    query: [H, T, D]; key, value: [H_kv, T, D]; labels: [T, 3]. Returns [T, H, D].
    """
    repeats = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
    logits = (query @ key.transpose(1, 2)) * scaling  # [H, T, T]
    logits = logits.masked_fill(~visible(labels, labels, window), float("-inf"))
    return (logits.softmax(-1) @ value).transpose(0, 1)


def install() -> None:
    """Make `attn_implementation=NAME` known to transformers; calling it again changes nothing.

    It gets no mask function: the layout carries the mask, and for a kernel without one the library builds none. Its
    own would wait for the device to see whether positions restart.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
