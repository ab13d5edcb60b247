"""Bradley-Terry with soft labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.objectives.pairwise import PairObjective


@dataclass(frozen=True)
class Soft(PairObjective):
    """Cross-entropy between the share of annotators who prefer a response and the probability that it is preferred.

    loss = -q log sigmoid(d) - (1 - q) log sigmoid(-d), d = r_better - r_worse, q = (1 - e) p + e (1 - p), with p the
    share and e = `label_smoothing` (Wang et al. 2024, "Secrets of RLHF in Large Language Models Part II";
    smoothing: Szegedy et al. 2016). Smallest at d = log(q / (1 - q)), so rewards stay bounded.

    Needs p of each comparison (`data.p_chosen_key`). With label smoothing p is 1 where the data have none. Use it where
    several annotators, or a model, judged each pair; label smoothing where labels are known to be noisy.

    Example: d = 1, p = 0.8: 0.8 x 0.313 + 0.2 x 1.313 = 0.513.
    """

    uses: ClassVar[tuple[str, ...]] = ("p_better",)
    label_smoothing: float = 0.0

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.label_smoothing else ("p_better",)

    def losses(self, differences: Tensor, batch: PackedBatch) -> Tensor:
        share = batch.p_better.nan_to_num(1.0)
        share = share + self.label_smoothing * (1 - 2 * share)
        return -share * F.logsigmoid(differences) - (1 - share) * F.logsigmoid(-differences)
