"""Objectives: rewards and comparisons become a loss sum and metric sums.

Add one: a file here with a function of `Objective`'s signature, and an entry in `OBJECTIVES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.objectives.bradley_terry import bradley_terry

Objective: TypeAlias = Callable[[Tensor, PackedBatch], tuple[Tensor, dict[str, Tensor]]]
"""(rewards [R] float32, batch) -> (loss summed over comparisons, metric sums by name)."""

OBJECTIVES: dict[str, Objective] = {"bradley_terry": bradley_terry}
