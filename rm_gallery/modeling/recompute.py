"""Activation checkpointing: what is kept of the forward pass, and what is computed again in the backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from rm_gallery.modeling.reward_model import RewardModel

Mode: TypeAlias = Literal["full", "selective"]

_KEPT = (
    "aten::mm", "aten::addmm",
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_flash_attention_forward", "torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward",
)  # fmt: skip
"""What `selective` keeps: the outputs of weight matrices and of fused attention."""


def enable_checkpointing(model: RewardModel, mode: Mode) -> None:
    """`full` keeps each layer's input alone; `selective` also what takes long to compute, and recomputes the rest.

    Plain attention on a CPU, which is made of products of its own, is computed again either way.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    if hasattr(model.network, "activation_checkpointing_enable"):
        model.network.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # its older name
        model.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _policy(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    is_flex = operation is torch.ops.higher_order.flex_attention
    name = operation.name().partition(".")[0] if isinstance(operation, torch._ops.OpOverload) else ""
    return CheckpointPolicy.MUST_SAVE if is_flex or name in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
