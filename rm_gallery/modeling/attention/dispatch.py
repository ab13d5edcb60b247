"""Packed attention: the kernels, the choice between them, and the reference that all of them are tested against.

`install` registers `packed_attention` with transformers' attention interface, so model code stays the library's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.errors import UserError
from rm_gallery.modeling.architectures import common_setting
from rm_gallery.modeling.attention.cpu import is_worth_splitting, plain_attention, split_attention
from rm_gallery.modeling.attention.flex import flex_attention
from rm_gallery.modeling.attention.flex import is_available as flex_is_available
from rm_gallery.modeling.attention.layout import AttentionSpec, PackLayout, Reach, visible
from rm_gallery.modeling.attention.past import PastKeys
from rm_gallery.modeling.attention.varlen import find_flash, takes_softcap, varlen_attention

__all__ = [
    "NAME",
    "AttentionSpec",
    "PackLayout",
    "attend",
    "carried_layout",
    "carry_layout",
    "check",
    "install",
    "lay_out",
    "packed_attention",
    "reference_attention",
    "takes",
    "visible",
]

# T tokens, N queries (T, or R in the last layer), H query heads, H_kv key heads, D head dimension
# of a bucket: B groups, Q and K queries and keys of its longest group

NAME = "rm_gallery_packed"
"""`attn_implementation` in transformers."""
_MAX_PLAIN_TOKENS = {torch.bfloat16: 2048, torch.float32: 256}
"""On a CPU, plain attention is faster than SDPA up to this length of a batch's longest group (docs/log.md)."""


def lay_out(batch: PackedBatch, kernel: str = "auto", past: PastKeys | None = None) -> PackLayout:
    """The attention layout of a batch; `kernel` is the setting `model.attention`. past: see `PackLayout`."""
    return PackLayout(batch.group_lengths, batch.tail_lengths, batch.input_ids.device, kernel, past)


_layout: ContextVar[PackLayout | None] = ContextVar("layout", default=None)
_NOT_NAMED: Any = object()


@contextmanager
def carry_layout(layout: PackLayout | None) -> Iterator[None]:
    """Attention in this block has this layout where a model's layers drop keyword arguments (Nemotron, StableLM)."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def carried_layout() -> PackLayout | None:
    """The layout of the innermost `carry_layout`."""
    return _layout.get()


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    packed: PackLayout | None = None, scaling: float | None = None, dropout: float = 0.0,
    sliding_window: int | None = _NOT_NAMED, softcap: float | None = None, s_aux: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of all tokens, with the signature of transformers' interface.

    query: [1, H, T, D]; key, value: [1, H_kv, T, D]. Returns [1, T, H, D].
    """
    packed = carried_layout() if packed is None else packed
    if packed is None:
        raise RuntimeError(f"attn_implementation={NAME} was called without the layout of a packed batch")
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    window, chunk = _reach(module, sliding_window)
    spec = AttentionSpec(scaling, window, softcap, s_aux, dropout, chunk)
    correction = _temperature_correction(module, packed)
    if correction is not None:
        query = (query * correction).to(query.dtype)
    if packed.past is not None:
        key, value = packed.extend(module.layer_idx, key, value)  # type: ignore[arg-type]
    try:
        return attend(query, key, value, packed, spec).unsqueeze(0), None
    except UserError as error:
        raise UserError(f"{type(module).__name__}: {error}") from error


def _reach(module: Any, window: int | None) -> Reach:
    """Window and chunk of a layer. A mask may have them that the call does not name (Qwen2 MoE, PhiMoE, Llama 4)."""
    config = getattr(module, "config", None)
    kinds = common_setting(config, "layer_types")
    kind = kinds[module.layer_idx] if kinds and hasattr(module, "layer_idx") else "sliding_attention"
    chunk = common_setting(config, "attention_chunk_size") if kind == "chunked_attention" else None
    if window is _NOT_NAMED:
        window = common_setting(config, "sliding_window") if kind == "sliding_attention" else None
    return window, chunk


def _temperature_correction(module: Any, packed: PackLayout) -> Tensor | None:
    """[T, 1, 1] factors on the queries of Llama 4's layers without rotary embedding.

    These layers scale queries by their position, which transformers counts over the whole pack: query 9 of a text that
    starts at token 100 was scaled as the query 109. The factor is the scale of the former by that of the latter.
    """
    if getattr(module, "use_rope", True) or not getattr(module, "attn_temperature_tuning", False):
        return None
    floor, strength = module.floor_scale, module.attn_scale
    if int(packed.lengths.sum()) < floor:  # all scales are 1
        return None

    def factors() -> Tensor:
        positions = np.stack([packed.host_labels[packed.computed, 2], np.arange(len(packed.computed))])
        scales = 1 + strength * np.log1p((positions + 1) // floor)
        return packed.to_device((scales[0] / scales[1]).astype(np.float32))[:, None, None]

    return packed.cached(("temperature", floor, strength), factors)


def attend(
    query: Tensor, key: Tensor, value: Tensor, packed: PackLayout, spec: AttentionSpec, *, rewards_only: bool = False
) -> Tensor:
    """Attention by the first suitable kernel.

    query: [N, H, D]; key, value: [T, H_kv, D]. rewards_only: the queries are the R reward tokens instead of all T.
    Returns [N, H, D]. Raises UserError when no kernel takes a field of `spec` that is set.
    """
    if not len(query):
        return query
    if spec.window is not None or spec.chunk is not None:
        window, chunk = (None if each is None or each >= packed.longest_text else each for each in spec.reach)
        spec = replace(spec, window=window, chunk=chunk)
    same_widths = query.shape[-1] == value.shape[-1]
    kernel = _choose(query, packed, spec, rewards_only, same_widths)
    return kernel.run(query, key, value, packed, spec, rewards_only=rewards_only)


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: PackLayout, spec: AttentionSpec, *, rewards_only: bool = False
) -> Tensor:
    """One call of torch's scaled_dot_product_attention for each bucket."""
    queries = packed.queries(rewards_only=rewards_only)
    repeats = query.shape[1] // key.shape[1]
    outputs = []
    for number, bucket in enumerate(queries.buckets):
        q = _rows(query, bucket.query_rows)
        # Key heads are repeated here: with `enable_gqa` and a mask, some GPU back ends fall back to plain products.
        k, v = (_rows(part, bucket.key_tokens).repeat_interleave(repeats, 1) for part in (key, value))
        mask = queries.mask(number, spec.reach)
        if spec.sinks is not None:
            q, k, v, mask = _with_sink_key(q, k, v, mask, spec.sinks / spec.scaling)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=spec.dropout, scale=spec.scaling)
        outputs.append(out[..., : value.shape[-1]].transpose(1, 2).flatten(0, 1))  # [B x Q, H, D]
    return torch.cat(outputs).index_select(0, queries.restore)


def _with_sink_key(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, product: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys, values [B, H, L, D] and the mask with one more key, whose products with queries are `product` [H].

    Its value is 0, and it has a coordinate of its own, in which every query is 1. Widths stay multiples of 8.
    """
    wider = 8 - q.shape[-1] % 8
    ones = F.pad(q.new_ones(*q.shape[:-1], 1), (0, wider - 1))
    sink = product.to(k.dtype)[:, None, None] * F.pad(k.new_ones(1), (q.shape[-1], wider - 1))  # [H, 1, D + wider]
    k = torch.cat([F.pad(k, (0, wider)), sink.expand(len(k), -1, -1, -1)], 2)
    return torch.cat([q, ones], -1), k, F.pad(v, (0, wider, 0, 1)), F.pad(mask, (0, 1), value=True)


def _rows(part: Tensor, index: Tensor) -> Tensor:
    """[rows, heads, D] -> [B, heads, L, D]; index: [B, L]"""
    return part.index_select(0, index.view(-1)).view(*index.shape, *part.shape[1:]).transpose(1, 2)


@dataclass(frozen=True)
class Kernel:
    """A kernel and what it supports."""

    run: Callable[..., Tensor]
    """(query [N, H, D], key [T, H_kv, D], value, layout, spec, *, rewards_only) -> [N, H, D]"""
    takes: frozenset[str] = frozenset()
    """Fields of AttentionSpec that it supports, besides `scaling` and `window`; see `takes`."""
    needs_gpu: bool = False
    """GPU only, and for all tokens only: one query per response is not worth a layout of its own."""
    same_widths: bool = False
    """Heads of queries and of values have to have the same dimension (in latent attention they do not)."""
    head_dims: range = range(1, 1 << 30)


KERNELS = {
    "split": Kernel(split_attention, takes=frozenset({"sinks"}), same_widths=True),
    "plain": Kernel(plain_attention, takes=frozenset({"softcap", "sinks", "dropout", "chunk"})),
    "varlen": Kernel(varlen_attention, needs_gpu=True, same_widths=True, head_dims=range(8, 257, 8)),
    "flex": Kernel(flex_attention, takes=frozenset({"softcap", "sinks", "chunk"}), needs_gpu=True, same_widths=True,
                   head_dims=range(16, 257)),
    "sdpa": Kernel(sdpa_attention, takes=frozenset({"sinks", "dropout", "chunk"})),
}  # fmt: skip
_IN_WORDS = {"softcap": "a soft cap", "sinks": "sinks", "dropout": "attention dropout", "chunk": "chunked attention"}


def _choose(
    query: Tensor, packed: PackLayout, spec: AttentionSpec, rewards_only: bool, same_widths: bool = True
) -> Kernel:
    """The first candidate that takes every field of `spec` that is set."""
    needed = {name for name in ("softcap", "sinks", "chunk") if getattr(spec, name) is not None}
    needed |= {"dropout"} if spec.dropout else set()
    candidates = _candidates(query, packed, spec, rewards_only)
    if not same_widths:
        candidates = [name for name in candidates if not KERNELS[name].same_widths] or ["sdpa", "plain"]
    for name in candidates:
        if needed <= takes(name):
            return KERNELS[name]
    missing = " and ".join(_IN_WORDS[name] for name in sorted(needed - takes(candidates[0])))
    raise UserError(f"model.attention={packed.kernel} does not support {missing}, which the model has; set auto")


def takes(name: str) -> frozenset[str]:
    """Fields that a kernel supports here."""
    more = {"softcap"} if name == "varlen" and takes_softcap() else set()
    return KERNELS[name].takes | more


def _candidates(query: Tensor, packed: PackLayout, spec: AttentionSpec, rewards_only: bool) -> list[str]:
    """Kernels that can compute these queries, fastest first: by measurement on a CPU (docs/log.md), varlen on a GPU.

    The last one takes every field.
    """
    if packed.past is not None:
        return ["sdpa", "plain"]  # the others expect the queries of all tokens
    if packed.kernel != "auto":
        return ["sdpa", "plain"] if rewards_only and KERNELS[packed.kernel].needs_gpu else [packed.kernel]
    names = []
    if query.device.type == "cpu":
        is_inference = query.dtype == torch.float32 and not (torch.is_grad_enabled() or rewards_only)
        if is_inference and spec.reach == (None, None) and is_worth_splitting(packed):
            names.append("split")
        if int(packed.lengths.max()) <= _MAX_PLAIN_TOKENS.get(query.dtype, 0):
            names.append("plain")
    elif not rewards_only:
        names += [
            name
            for name in ("varlen", "flex")
            if query.shape[-1] in KERNELS[name].head_dims and _why_not(name, query.device, query.dtype) is None
        ]
    return [*names, "sdpa", "plain"]


def check(setting: str, device: torch.device, dtype: torch.dtype, dropout: float) -> None:
    """Raise UserError if the kernel of `model.attention` cannot train in this type on this device."""
    if setting == "auto":
        return
    reason = _why_not(setting, device, dtype)
    if dropout and "dropout" not in takes(setting):
        reason = "it does not support attention dropout, and model.dropout is not 0"
    if reason is not None:
        raise UserError(f"model.attention={setting}: {reason}; set auto, which selects a supported kernel")


def _why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a kernel cannot train here; None if it can."""
    if KERNELS[name].needs_gpu and device.type != "cuda":
        return "it needs a GPU"
    if name == "varlen":
        if dtype == torch.float32:
            return "it computes in bf16, and model.fsdp_config.model_dtype is fp32"
        if find_flash() is None:
            return "neither this torch nor a flash-attn package has a variable-length kernel for this GPU"
    if name == "flex" and not flex_is_available():
        return "it needs triton"
    return None


def reference_attention(query: Tensor, key: Tensor, value: Tensor, labels: Tensor, spec: AttentionSpec) -> Tensor:
    """The visibility rule over all T x T pairs: the reference of every kernel.

    query: [H, T, D]; key, value: [H_kv, T, D]; labels: [T, 3]. Returns [T, H, D].
    """
    repeats = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
    scores = (query @ key.transpose(1, 2)) * spec.scaling  # [H, T, T]
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.masked_fill(~visible(labels, labels, *spec.reach), float("-inf"))
    if spec.sinks is not None:
        scores = torch.cat([scores, spec.sinks[:, None, None].expand(-1, len(labels), 1)], -1)
    weights = F.dropout(scores.softmax(-1)[..., : len(labels)], spec.dropout)
    return (weights @ value).transpose(0, 1)


def install() -> None:
    """Register `attn_implementation=NAME` with transformers; idempotent.

    No mask function is registered: the layout carries the mask, and transformers builds none for a kernel without one.
    Its own would wait for the device to see whether positions restart.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
