"""Exponential moving average (EMA) of the trained weights, replicated or sharded as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rm_gallery.modeling.parallel.master_weights import TrainedWeights, local

NAME = "ema"
"""Of the average in training states, metrics and checkpoint folders."""


class AveragedWeights:
    """A float32 average of the trained weights, which starts at their values.

    Each update is `average += (1 - d) (weights - average)`, where d is the decay, or (1 + n) / (10 + n) after n updates
    while that is less: the first weights, which are not trained, would otherwise dominate short runs.
    """

    def __init__(self, weights: TrainedWeights, decay: float) -> None:
        self.weights, self.decay = weights, decay
        self.tensors: dict[str, Tensor] = {}
        """By the names of the weights; DTensors if these are sharded."""
        self._kept: list[Tensor] = []
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Start again at the present weights."""
        named = self.weights.named_parameters()
        self.tensors = {name: each.detach().to(torch.float32, copy=True) for name, each in named}

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Add the present weights. num_updates: of before this one."""
        step = 1 - min(self.decay, (1 + num_updates) / (10 + num_updates))
        for average, value in self._pairs():
            average.lerp_(value.float(), step)  # without a copy of float32 weights

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with the average inside the block, and with its own bits after it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Exchange weights and average. Of narrower weights, which cannot hold the average, a copy is kept instead."""
        kept, self._kept = iter(self._kept), []
        for average, value in self._pairs():
            if value.dtype == torch.float32:
                before = value.clone()
                value.copy_(average)
                average.copy_(before)
            elif (before_narrow := next(kept, None)) is not None:
                value.copy_(before_narrow)
            else:
                self._kept.append(value.clone())
                value.copy_(average)
        self.weights.copy_to_model()

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(average, weight) of each parameter: whole, or this rank's shard."""
        for name, parameter in self.weights.named_parameters():
            yield local(self.tensors[name]), local(parameter.detach())
