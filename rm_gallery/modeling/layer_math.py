"""RMS norm and rotary embedding with their backward passes written out: fewer passes over memory than autograd's.

On two cores these two took a tenth of a training step, in which matrix products should take the time (docs/log.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# T tokens, H heads, D features of a token or of a head


def rms_norm(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * states / rms(states) over the last axis (Zhang and Sennrich 2019), rounded where Llama's is.

    The norm is worked out in float32; its result has the type of `states`, as has the product with `weight`.
    """
    result: Tensor = _RmsNorm.apply(states, weight, epsilon)
    return result


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = states.float()
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = size.square_().div_(states.shape[-1]).add_(epsilon).rsqrt_()
        normal = (wide * inverse).to(states.dtype)
        ctx.save_for_backward(normal, weight, inverse)
        return normal * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # y = w n, n = x / r: dx = (dn - n mean(dn n)) / r with dn = w dy
        normal, weight, inverse = ctx.saved_tensors
        gradient = gradients[0]
        wanted = gradient * weight
        mean = (wanted * normal).sum(-1, keepdim=True, dtype=torch.float32).div_(normal.shape[-1])
        states = torch.addcmul(wanted.float(), normal.float(), mean, value=-1).mul_(inverse).to(gradient.dtype)
        summed = (gradient * normal).flatten(0, -2).sum(0)
        return states, summed.to(weight.dtype), None


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021), the first half of a head against the second.

    states: [T, H, D]; cos, sin: [T, D], of which no gradient is taken.
    """
    result: Tensor = _Rotate.apply(states, cos.unsqueeze(1), sin.unsqueeze(1))
    return result


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = states.chunk(2, -1)
        sin_first, sin_second = sin.chunk(2, -1)
        turned = states * cos
        a, b = turned.chunk(2, -1)
        a.addcmul_(second, sin_first, value=-1)
        b.addcmul_(first, sin_second)
        return turned

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        first, second = gradients[0].chunk(2, -1)
        sin_first, sin_second = sin.chunk(2, -1)
        states = gradients[0] * cos
        a, b = states.chunk(2, -1)
        a.addcmul_(second, sin_second)
        b.addcmul_(first, sin_first, value=-1)
        return states, None, None
