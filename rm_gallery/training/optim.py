"""The optimizer and the learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import nn

Schedule: TypeAlias = Callable[[int], float]
"""Step, from 0, to a factor on the learning rate."""


@dataclass(frozen=True)
class OptimConfig:
    """`optim`: AdamW and its schedule."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    lr: Annotated[float, Gt(0)] = 1e-6
    """Highest learning rate."""
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.95)
    """AdamW's decay rates of the gradient's mean and of its square."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """AdamW's term against division by zero."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """On matrices only: biases and norms are not decayed."""
    clip_grad: Annotated[float, Ge(0)] = 1.0
    """Largest gradient norm; 0 does not clip."""
    lr_scheduler: Literal["cosine", "wsd", "constant"] = "cosine"
    """Course of the rate after the warm-up: `cosine`, `wsd` (warmup-stable-decay) or `constant`."""
    warmup_steps_ratio: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of all steps in which the rate rises from 0."""
    min_lr_ratio: Annotated[float, Ge(0), Le(1)] = 0.0
    """Rate at the end of `cosine` and `wsd`, as a share of the highest."""
    decay_steps_ratio: Annotated[float, Ge(0), Le(1)] = 0.1
    """`wsd`: share of all steps in which the rate falls at the end."""


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
    """The configured schedule over so many optimizer steps."""
    warmup = round(total_steps * config.warmup_steps_ratio)
    decay = min(round(total_steps * config.decay_steps_ratio), total_steps - warmup)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return SCHEDULES[config.lr_scheduler](step - warmup, max(1, total_steps - warmup), decay, config.min_lr_ratio)

    return factor


def constant(step: int, steps: int, decay_steps: int, floor: float) -> float:
    """1 throughout."""
    return 1.0


def cosine(step: int, steps: int, decay_steps: int, floor: float) -> float:
    """Half a cosine from 1 at step 0 to `floor` at step `steps` (Loshchilov and Hutter 2017, section 3)."""
    progress = min(1.0, step / steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def wsd(step: int, steps: int, decay_steps: int, floor: float) -> float:
    """Warmup-stable-decay: 1, then straight down to `floor` in the last `decay_steps` (Hu et al. 2024, section 4)."""
    left = steps - step
    if left >= decay_steps or not decay_steps:
        return 1.0
    return floor + (1 - floor) * max(0, left) / decay_steps


SCHEDULES: dict[str, Callable[[int, int, int, float], float]] = {"constant": constant, "cosine": cosine, "wsd": wsd}
