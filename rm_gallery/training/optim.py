"""The optimizer and the learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from torch import nn

from rm_gallery.training.config import OptimConfig

Schedule: TypeAlias = Callable[[int], float]
"""Step, from 0, to a factor on the learning rate."""


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only (Loshchilov and Hutter 2019)."""
    trained = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    groups = [
        {"params": [each for each in trained if each.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [each for each in trained if each.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )


def build_schedule(config: OptimConfig, total_steps: int) -> Schedule:
    """The configured schedule over `total_steps` optimizer steps."""
    warmup = round(total_steps * config.warmup_steps_ratio)
    decay = min(round(total_steps * config.decay_steps_ratio), total_steps - warmup)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return SCHEDULES[config.lr_scheduler](step - warmup, max(1, total_steps - warmup), decay, config.min_lr_ratio)

    return factor


def constant(step: int, steps: int, decay_steps: int, floor: float) -> float:
    """Constant 1."""
    return 1.0


def cosine(step: int, steps: int, decay_steps: int, floor: float) -> float:
    """Half a cosine from 1 at step 0 to `floor` at step `steps` (Loshchilov and Hutter 2017, section 3)."""
    progress = min(1.0, step / steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def wsd(step: int, steps: int, decay_steps: int, floor: float) -> float:
    """Warmup-stable-decay: 1, then a linear decay to `floor` in the last `decay_steps` (Hu et al. 2024, section 4)."""
    left = steps - step
    if left >= decay_steps or not decay_steps:
        return 1.0
    return floor + (1 - floor) * max(0, left) / decay_steps


SCHEDULES: dict[str, Callable[[int, int, int, float], float]] = {"constant": constant, "cosine": cosine, "wsd": wsd}
