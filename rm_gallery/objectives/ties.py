"""What objectives with ties have in common: probabilities of three outcomes, a learned threshold, metrics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.objectives.metrics import means, pairwise_sums
from rm_gallery.objectives.pairwise import PairObjective

# C comparisons


@dataclass(frozen=True)
class TieObjective(PairObjective):
    """Negative log-likelihood of the outcome of each comparison: one response is better, or both are tied.

    The threshold is how often close responses tie. It is a parameter of the objective, trained with the model at
    `objective.threshold_lr` as its logarithm, so it stays positive. It starts where responses of equal reward tie as
    often as the comparisons of the training data. Without it ties would have to be dropped, and two responses that
    annotators could not tell apart would say nothing about their rewards.
    """

    uses: ClassVar[tuple[str, ...]] = ("tied",)
    needs = ("tied",)
    log_threshold: nn.Parameter = field(
        init=False, repr=False, compare=False, default_factory=lambda: nn.Parameter(torch.zeros(()))
    )

    @abstractmethod
    def log_probabilities(self, differences: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[C] each: logarithms of the probability of `better`, of a tie, and of `worse`. differences: [C]."""

    @abstractmethod
    def threshold_of(self, share: float) -> float:
        """The threshold at which two responses of equal reward tie with this probability, above 0 and below 1."""

    def losses(self, differences: Tensor, batch: PackedBatch) -> Tensor:
        better, tie, _ = self.log_probabilities(differences)
        return -torch.where(batch.tied, tie, better)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {"log_threshold": self.log_threshold}

    def start(self, data: TokenData) -> None:
        with torch.no_grad():
            self.log_threshold.fill_(self.threshold_of(data.num_tied / data.num_comparisons)).log_()

    def record(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"threshold": values["log_threshold"].double().exp().item()}

    def sums(self, rewards: Tensor, batch: PackedBatch) -> dict[str, Tensor]:
        better, worse, tied = rewards[batch.better], rewards[batch.worse], batch.tied
        wins, tie, losses = (each.detach() for each in self.log_probabilities(better - worse))
        is_tie, is_win = (tie > wins) & (tie > losses), (wins > losses) & (wins >= tie)
        # Ties count as two rewards of 0, which are never correct and add nothing to the means.
        return {
            **pairwise_sums(better.where(~tied, 0.0), worse.where(~tied, 0.0)),
            "ties": tied.sum(),
            "correct_with_ties": torch.where(tied, is_tie, is_win).sum(),
            "tie_log_likelihood": tie.where(tied, 0.0).sum(),
            "threshold": self.log_threshold.detach().double().exp() * tied.numel(),
        }

    def means(self, sums: Mapping[str, float], prefix: str) -> dict[str, float]:
        """Accuracy, margin and mean rewards of comparisons without a tie; the share of ties, and their log-likelihood.

        `accuracy_with_ties` is the share of comparisons whose most probable outcome, of three, is the one in the data.
        """
        found = means(sums, prefix)
        if not found:
            return {}
        count, ties = sums["comparisons"], sums["ties"]
        for name in ("accuracy", "margin", "reward_chosen", "reward_rejected"):
            value = found.pop(f"{prefix}/{name}")
            if count > ties:
                found[f"{prefix}/{name}"] = value * count / (count - ties)
        found[f"{prefix}/accuracy_with_ties"] = sums["correct_with_ties"] / count
        found[f"{prefix}/tie_share"] = ties / count
        if ties:
            found[f"{prefix}/tie_log_likelihood"] = sums["tie_log_likelihood"] / ties
        return {**found, f"{prefix}/threshold": sums["threshold"] / count}
