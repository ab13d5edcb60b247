"""What objectives on pairs have in common: a loss per comparison, its weight, and the options that bound rewards."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.objectives.base import Objective
from rm_gallery.objectives.metrics import means, pairwise_sums

# C comparisons


@dataclass(frozen=True)
class PairObjective(Objective):
    """A loss of each comparison, summed with the weights of the comparisons. Rankings are all their comparisons.

    Each comparison adds center_coefficient x (r_better + r_worse)^2 to its loss (Eisenstein et al. 2023, "Helping or
    Herding? Reward Model Ensembles Mitigate but do not Eliminate Reward Hacking"; the same as TRL's
    `center_rewards_coefficient`), which fixes the constant that differences leave open, and
    reward_l2 x (r_better^2 + r_worse^2) / 2, which also keeps rewards small. The weight of a comparison is a factor on
    all of it: a weight of 2 is the comparison twice.

    Example: rewards 3 and 1, center_coefficient 0.01, reward_l2 0.1: 0.01 x 16 + 0.1 x 5 = 0.66 more.
    """

    center_coefficient: float = 0.0
    reward_l2: float = 0.0

    @abstractmethod
    def losses(self, differences: Tensor, batch: PackedBatch) -> Tensor:
        """[C] loss of each comparison. differences: [C], r_better - r_worse."""

    def loss(self, rewards: Tensor, batch: PackedBatch) -> Tensor:
        better, worse = rewards[batch.better], rewards[batch.worse]
        losses = self.losses(better - worse, batch)
        if self.center_coefficient:
            losses = losses + self.center_coefficient * (better + worse).square()
        if self.reward_l2:
            losses = losses + self.reward_l2 * (better.square() + worse.square()) / 2
        return (losses * batch.weight).sum()

    def sums(self, rewards: Tensor, batch: PackedBatch) -> dict[str, Tensor]:
        return pairwise_sums(rewards[batch.better], rewards[batch.worse])

    def means(self, sums: Mapping[str, float], prefix: str) -> dict[str, float]:
        return means(sums, prefix)
