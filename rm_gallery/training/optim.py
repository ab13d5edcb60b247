"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rm_gallery.errors import UserError
from rm_gallery.training.config import OptimConfig

Schedule: TypeAlias = Callable[[int], float]
"""Step, from 0, to a factor on the learning rate."""


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
) -> torch.optim.Optimizer:
    """The optimizer of `optim.name`, with weight decay on matrices only (Loshchilov and Hutter 2019).

    Raises UserError for sharded parameters with another optimizer than AdamW.
    """
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if config.name != "adamw" and any(isinstance(parameter, DTensor) for _, parameter in trained):
        raise UserError(
            f"optim.name={config.name} cannot update sharded parameters (fsdp2); set model.strategy=ddp, or "
            "optim.name=adamw"
        )
    if config.name == "muon":
        return Muon(trained, config)
    groups = _groups([parameter for _, parameter in trained], config.weight_decay)
    if config.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    groups = [
        {"params": [each for each in parameters if each.ndim >= 2], "weight_decay": weight_decay},
        {"params": [each for each in parameters if each.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the matrices of layers, AdamW for embeddings, heads, norms, biases and experts.

    One momentum buffer for each matrix, whose update is orthogonalized. Updates are scaled to the size of AdamW's
    (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2), so that `optim.lr` means the same.
    """

    def __init__(self, named_parameters: Sequence[tuple[str, nn.Parameter]], config: OptimConfig) -> None:
        matrices = [parameter for name, parameter in named_parameters if is_layer_matrix(name, parameter)]
        chosen = set(matrices)
        rest = _groups([each for _, each in named_parameters if each not in chosen], config.weight_decay)
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(torch.optim.Muon(
                matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
            ))  # fmt: skip
        if rest:
            self._parts.append(torch.optim.AdamW(rest, lr=config.lr, betas=config.betas, eps=config.eps, fused=True))
        super().__init__([{"params": [each for _, each in named_parameters]}], {})
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step both, on the groups and the state of this optimizer: loading a state replaces them."""
        start = 0
        for part in self._parts:
            end = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:end], self.state
            part.step()
            start = end


def is_layer_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon updates it: a matrix of a numbered layer that is no table."""
    return parameter.ndim == 2 and bool(re.search(r"\.\d+\.", name)) and "emb" not in name and "_bias" not in name


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
