"""Mixture: how often the groups of each source are used in an epoch. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# N groups of all sources, M places of an epoch


@dataclass(frozen=True)
class Mixture:
    """How often the groups of each entry of `data.train_files` are used in an epoch."""

    entry: np.ndarray
    """[N] int: the entry of each group."""
    weights: Sequence[float]
    """By entry: 2 uses each of its groups twice, 0.5 a half of them, in the next epoch the other half."""

    def groups(self, *, seed: int, epoch: int) -> np.ndarray:
        """[M] int64: the groups of an epoch, in the order of the files, repeated ones one pass after the other."""
        parts = []
        for entry, weight in enumerate(self.weights):
            members = np.flatnonzero(self.entry == entry)
            whole, rest = int(weight), weight - int(weight)
            parts += [members] * whole
            count = round(rest * len(members))
            if count:
                turning = np.random.default_rng([seed, entry]).permutation(members)
                window = (epoch * count + np.arange(count)) % len(members)
                parts.append(np.sort(turning[window]))
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)
