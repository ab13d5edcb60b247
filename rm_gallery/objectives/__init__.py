"""Objectives: functions from rewards and comparisons to a loss sum and metric sums.

To add one, write a function with the signature `Objective` in a new file here, and add it to `OBJECTIVES`.
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
