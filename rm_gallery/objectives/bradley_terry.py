"""The Bradley-Terry loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.objectives.metrics import pairwise_sums


def bradley_terry(rewards: Tensor, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood that each better response is preferred to the worse one.

    P(i preferred to j) = sigmoid(r_i - r_j) (Bradley and Terry 1952; as a reward model's loss: Ouyang et al. 2022,
    "Training language models to follow instructions with human feedback", section 3.5).

    rewards: [R] float32. Returns the weighted loss *summed* over comparisons, and detached metric sums. The trainer
    divides by the number of comparisons of the whole step, so neither packing nor the number of ranks changes the
    result. Without comparisons the loss is 0 and part of the graph, so `backward` works. Ignores margins
    (`batch.margin`) and soft labels (`batch.p_better`).

    Example: rewards [2, 0, 1], comparisons (0 over 1) and (2 over 0), weights 1. Differences 2 and -1, loss
    0.127 + 1.313 = 1.440.
    """
    better, worse = rewards[batch.better], rewards[batch.worse]  # [C]
    losses = -F.logsigmoid(better - worse)
    loss = (losses * batch.weight).sum()
    sums = pairwise_sums(better.detach(), worse.detach())
    return loss, {"loss": loss.detach(), **sums}
