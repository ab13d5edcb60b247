"""The focal ranking loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.objectives.pairwise import PairObjective


@dataclass(frozen=True)
class Focal(PairObjective):
    """Comparisons that the model has right count less, the more so the surer it is.

    loss = -(1 - 2 max(0, P - 1/2))^gamma log P, P = sigmoid(r_better - r_worse), gamma = `focal_gamma` (Cai et al.
    2024, "InternLM2 Technical Report", section 4.2, with gamma 2; focal loss: Lin et al. 2017). Wrong comparisons
    (P at most 1/2) have the Bradley-Terry loss; gamma 0 is Bradley-Terry.

    Needs no label but which response is better. Use it where easy pairs dominate the data. Rewards are not calibrated.

    Example: difference 1, P = 0.731, gamma 2: (1 - 0.462)^2 x 0.313 = 0.091.
    """

    focal_gamma: float = 2.0

    def losses(self, differences: Tensor, batch: PackedBatch) -> Tensor:
        # 1 - 2 max(0, P - 1/2) = min(1, 2 sigmoid(-d)); as a logarithm, which no large difference makes 0.
        log_factor = -F.relu(-(math.log(2) + F.logsigmoid(-differences)))
        return -F.logsigmoid(differences) * (self.focal_gamma * log_factor).exp()
