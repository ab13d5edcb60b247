"""Cross-entropy of a language model whose logits are never in memory as a whole.

The logits of L targets over a vocabulary of V tokens take 4 L V bytes in float32: 12 GB for 20,000 targets and 151,936
tokens. They are computed a chunk of rows at a time, and their gradients with them, in the forward pass: the loss is a
sum, so the backward pass only multiplies the gradients of hidden states and output layer by one number. No logit is
computed twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# L targets, D hidden, V vocabulary

CHUNK_LOGITS = 1 << 26
"""Logits of a chunk: 256 MiB in float32."""


class TokenLosses(NamedTuple):
    """The losses of the targets of a batch."""

    total: Tensor
    """[] float32: the sum of weight x loss, with a gradient."""
    each: Tensor
    """[L] float32: -log of the probability of each target; without a gradient."""
    correct: Tensor
    """[L] bool: whether the target is the most likely token."""


class LogitScale(NamedTuple):
    """What a model does with the result of its output layer."""

    factor: float = 1.0
    softcap: float | None = None
    """Logits z become softcap * tanh(z / softcap)."""


PLAIN = LogitScale()


def logit_scale(config: Any) -> LogitScale:
    """What the language model of a configuration does with the result of its output layer."""
    factor = 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0  # Granite divides by it, HyperCLOVA X multiplies
    factor *= scaling if config.model_type.startswith("hyperclovax") else 1 / scaling
    for name in ("logit_scale", "output_multiplier"):  # Cohere, Muse
        factor *= getattr(config, name, None) or 1.0
    return LogitScale(float(factor), getattr(config, "final_logit_softcapping", None))


def target_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor,
    scale: LogitScale = PLAIN, *, chunk_logits: int | None = None,
) -> TokenLosses:  # fmt: skip
    """Losses of the logits `hidden @ weight.T + bias`; softmax and sums are float32.

    hidden: [L, D]; weight: [V, D]; bias: [V] or None; targets: [L] int64; weights: [L] float32. chunk_logits: see
    `CHUNK_LOGITS`.
    """
    rows = max(1, (chunk_logits or CHUNK_LOGITS) // len(weight))
    total, each, correct = _CrossEntropy.apply(
        hidden, weight, bias, targets, weights, scale, rows, torch.is_grad_enabled()
    )
    return TokenLosses(total, each, correct)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor,
        scale: LogitScale, rows: int, trains: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        wanted = [trains and needed for needed in ctx.needs_input_grad[:3]]
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        d_bias = None if bias is None or not wanted[2] else torch.zeros_like(bias, dtype=torch.float32)
        losses = torch.empty(len(hidden), device=hidden.device)
        correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits, slope = _logits(hidden[part], weight, bias, scale)
            target = targets[part].unsqueeze(1)
            normalizer = logits.logsumexp(1, keepdim=True)
            losses[part] = (normalizer - logits.gather(1, target)).squeeze(1)
            correct[part] = logits.argmax(1) == targets[part]
            if not any(wanted):
                continue
            # d loss / d logits = softmax - one-hot, times the weight of the target
            gradient = logits.sub_(normalizer).exp_()
            gradient.scatter_add_(1, target, gradient.new_full((1, 1), -1.0).expand_as(target))
            gradient.mul_(weights[part].unsqueeze(1))
            if slope is not None:
                gradient.mul_(slope)
            gradient.mul_(scale.factor)
            if d_bias is not None:
                d_bias += gradient.sum(0)
            narrow = gradient.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[part] = narrow @ weight
            if d_weight is not None:
                d_weight.addmm_(narrow.T, hidden[part]) if narrow.dtype == torch.float32 else d_weight.add_(
                    narrow.T @ hidden[part]
                )
        ctx.gradients = d_hidden, d_weight, d_bias
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(losses, correct)
        return (losses.double() * weights).sum().float(), losses, correct

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        found = [
            None if each is None else each.mul_(upstream[0]).to(dtype)
            for each, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None  # scaled in place
        return *found, None, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: LogitScale) -> tuple[Tensor, Tensor | None]:
    """[rows, V] float32, and the derivative of the soft cap there, if there is one."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if scale.factor != 1:
        logits = logits * scale.factor
    logits = logits.float()
    if scale.softcap is None:
        return logits, None
    capped = (logits / scale.softcap).tanh_()
    slope = 1 - capped.square()
    return capped.mul_(scale.softcap), slope
