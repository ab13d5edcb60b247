"""The Bradley-Terry loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.objectives.metrics import pairwise_sums


def bradley_terry(rewards: Tensor, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus the log likelihood that each better response beats the worse one.

    P(i beats j) = sigmoid(r_i - r_j) (Bradley and Terry 1952; as a reward model's loss: Ouyang et al. 2022,
    "Training language models to follow instructions with human feedback", section 3.5).

    rewards: [R] float32. Returns the loss *summed* over comparisons, each times its weight, and metric sums
    without gradients. The trainer divides by the number of comparisons of the whole step, so neither packing
    nor the number of ranks changes the result. No comparison gives 0 that still belongs to the graph.
    Of what the data say about a comparison only the weight counts here: this loss has no place for a margin
    (`batch.margin`) or for the share of people who agree (`batch.p_better`).
    """
    better, worse = rewards[batch.better], rewards[batch.worse]  # [C]
    losses = -F.logsigmoid(better - worse)
    loss = (losses * batch.weight).sum()
    sums = pairwise_sums(better.detach(), worse.detach())
    return loss, {"loss": loss.detach(), **sums}
