"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rm_gallery.errors import UserError
from rm_gallery.training.config import OptimConfig
from rm_gallery.training.low_precision import AdamW8bit, StochasticRounding
from rm_gallery.training.optimizers import Adafactor, Muon, groups_of

Schedule: TypeAlias = Callable[[int], float]
"""Step, from 0, to a factor on the learning rate."""


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    *,
    seed: int = 0,
    added: Mapping[str, nn.Parameter] = {},
    added_lr: float = 0.0,
) -> torch.optim.Optimizer:
    """The optimizer of `optim.name`, with weight decay on matrices only (Loshchilov and Hutter 2019).

    added: the parameters among them that are not the model's, with a learning rate of their own and no weight decay.
    bfloat16 parameters are rounded stochastically; seed: of the rounding. Raises UserError for an optimizer that cannot
    update parameters in host memory whose model is on a GPU.
    """
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if config.name in ("muon", "adafactor") and any(_is_offloaded(parameter) for _, parameter in trained):
        raise UserError(
            f"optim.name={config.name} cannot update offloaded parameters, which it communicates between GPUs; set "
            "model.fsdp_config.cpu_offload=false (optimizer_offload=true works), or optim.name=adamw or adamw_8bit"
        )
    of_model = [(name, parameter) for name, parameter in trained if name not in added]
    more = [{"params": [*added.values()], "lr": added_lr, "weight_decay": 0.0}] if added else []
    optimizer = _build(of_model, config, more)
    if any(parameter.dtype == torch.bfloat16 for _, parameter in trained):
        return StochasticRounding(optimizer, seed=seed)
    return optimizer


def _build(
    trained: Sequence[tuple[str, nn.Parameter]], config: OptimConfig, more: Sequence[dict[str, Any]]
) -> torch.optim.Optimizer:
    """more: further parameter groups, after those of the model."""
    if config.name == "muon":
        return Muon(trained, config, more)
    groups = [*groups_of([parameter for _, parameter in trained], config.weight_decay), *more]
    if config.name == "adafactor":
        for group in more:
            group["eps"] = (None, 1.0)  # steps are not relative to the size of the parameter
        return Adafactor(groups, lr=config.lr)
    if config.name == "adamw_8bit":
        return AdamW8bit(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _is_offloaded(parameter: torch.Tensor) -> bool:
    return isinstance(parameter, DTensor) and parameter.device.type != parameter.device_mesh.device_type


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
