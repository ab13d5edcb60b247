"""Metrics: sums on the device, reduced over ranks and divided by their count only when they are read.

A mean of per-batch means is wrong when batches differ in size, and reading a value per micro-batch synchronizes with
the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rm_gallery.distributed.collectives import sum_over_ranks

# C comparisons


class Sums:
    """Named float64 sums on one device; nothing is copied to the host before `read`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Add 0-dimensional tensors, by name."""
        for name, value in sums.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def merge(self, other: Sums) -> None:
        """Add all sums of `other`."""
        self.add(other._sums)

    def read(self) -> dict[str, float]:
        """Return the sums over all ranks, with one copy to the host, and reset them.

        A collective: every rank calls it, with the same names.
        """
        names = list(self._sums)
        values = sum_over_ranks(torch.stack([self._sums[name] for name in names])).tolist() if names else []
        self._sums = {}
        return dict(zip(names, values, strict=True))

    def peek(self) -> dict[str, float]:
        """Return the sums of this rank without resetting them."""
        return {name: float(value) for name, value in self._sums.items()}


def pairwise_sums(better: Tensor, worse: Tensor) -> dict[str, Tensor]:
    """Sums over comparisons for accuracy, mean margin and mean rewards.

    better, worse: [C] float32 rewards of the preferred and the other response.
    A tie counts as wrong, as in RewardBench: a model that gives every text the same reward has accuracy 0.
    """
    return {
        # torch.full fills on the device; torch.tensor would copy from pageable memory, which waits for the GPU.
        "comparisons": torch.full((), float(better.numel()), device=better.device),
        "correct": (better > worse).sum(),
        "margin": (better - worse).sum(),
        "reward_chosen": better.sum(),
        "reward_rejected": worse.sum(),
    }


def means(sums: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Divide `loss` and the `pairwise_sums` by the number of comparisons; {} without comparisons."""
    count = sums.get("comparisons", 0.0)
    if not count:
        return {}
    return {
        f"{prefix}/loss": sums["loss"] / count,
        f"{prefix}/accuracy": sums["correct"] / count,
        f"{prefix}/margin": sums["margin"] / count,
        f"{prefix}/reward_chosen": sums["reward_chosen"] / count,
        f"{prefix}/reward_rejected": sums["reward_rejected"] / count,
        **({f"{prefix}/router_aux_loss": sums["router_aux_loss"] / count} if "router_aux_loss" in sums else {}),
    }
