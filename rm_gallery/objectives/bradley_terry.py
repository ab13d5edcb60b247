"""The Bradley-Terry loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.objectives.pairwise import PairObjective


@dataclass(frozen=True)
class BradleyTerry(PairObjective):
    """Negative log-likelihood that each better response is preferred to the worse one.

    P(i preferred to j) = sigmoid(r_i - r_j) (Bradley and Terry 1952; as a reward model's loss: Ouyang et al. 2022,
    "Training language models to follow instructions with human feedback", section 3.5).

    Needs no label but which response is better. Margins (`batch.margin`) and soft labels (`batch.p_better`) are
    ignored. Use it unless the data have more, and more helps on held-out data.

    Example: rewards [2, 0, 1], comparisons (0 over 1) and (2 over 0), weights 1. Differences 2 and -1, loss
    0.127 + 1.313 = 1.440.
    """

    def losses(self, differences: Tensor, batch: PackedBatch) -> Tensor:
        return -F.logsigmoid(differences)


bradley_terry = BradleyTerry()
