"""The hinge loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.objectives.pairwise import PairObjective


@dataclass(frozen=True)
class Hinge(PairObjective):
    """Each difference of reward must exceed the same margin.

    loss = max(0, `hinge_margin` - (r_better - r_worse)) (Herbrich et al. 2000, "Large Margin Rank Boundaries for
    Ordinal Regression"; Joachims 2002, "Optimizing Search Engines using Clickthrough Data").

    Needs no label but which response is better. Use it where only the order matters: comparisons beyond the margin have
    no gradient, so rewards do not drift apart, and differences are not log-odds.

    Example: difference 0.4, margin 1: 0.6.
    """

    hinge_margin: float = 1.0

    def losses(self, differences: Tensor, batch: PackedBatch) -> Tensor:
        return F.relu(self.hinge_margin - differences)
