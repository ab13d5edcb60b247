"""The Bradley-Terry loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.objectives.base import Objective
from rm_gallery.objectives.metrics import means, pairwise_sums


class BradleyTerry(Objective):
    """Negative log-likelihood that each better response is preferred to the worse one.

    P(i preferred to j) = sigmoid(r_i - r_j) (Bradley and Terry 1952; as a reward model's loss: Ouyang et al. 2022,
    "Training language models to follow instructions with human feedback", section 3.5).

    Weights of comparisons are factors of their losses. Margins (`batch.margin`) and soft labels (`batch.p_better`) are
    ignored.

    Example: rewards [2, 0, 1], comparisons (0 over 1) and (2 over 0), weights 1. Differences 2 and -1, loss
    0.127 + 1.313 = 1.440.
    """

    def loss(self, rewards: Tensor, batch: PackedBatch) -> Tensor:
        losses = -F.logsigmoid(rewards[batch.better] - rewards[batch.worse])  # [C]
        return (losses * batch.weight).sum()

    def sums(self, rewards: Tensor, batch: PackedBatch) -> dict[str, Tensor]:
        return pairwise_sums(rewards[batch.better], rewards[batch.worse])

    def means(self, sums: Mapping[str, float], prefix: str) -> dict[str, float]:
        return means(sums, prefix)


bradley_terry = BradleyTerry()
