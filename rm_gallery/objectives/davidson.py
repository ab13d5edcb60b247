"""Bradley-Terry with ties, whose odds are in proportion to the geometric mean of both strengths."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rm_gallery.objectives.ties import TieObjective


@dataclass(frozen=True)
class Davidson(TieObjective):
    """Ties compete with both responses, at the geometric mean of their strengths exp(r).

    With d = r_i - r_j and the threshold v > 0 (Davidson 1970, "On Extending the Bradley-Terry Model to Accommodate Ties
    in Paired Comparison Experiments"):

    - P(i preferred to j) = exp(d / 2) / (exp(d / 2) + exp(-d / 2) + v)
    - P(j preferred to i) = exp(-d / 2) / (the same)
    - P(tie) = v / (the same)

    Where there is no tie, P(i preferred to j) is that of Bradley-Terry, sigmoid(d), whatever v is. Starts at
    v = 2 s / (1 - s), s the share of ties.

    Needs comparisons that are ties, see `TieObjective`. Use it where annotators could answer "about the same", and
    sigmoid(d) shall stay the probability that a response is preferred among comparisons without a tie.

    Example: d = 1, v = 1: of 1.649 + 0.607 + 1 = 3.255, preferred -log(1.649 / 3.255) = 0.680, tie 1.180.
    """

    def log_probabilities(self, differences: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        half = differences / 2
        outcomes = torch.stack([half, self.log_threshold.to(half.dtype).expand_as(half), -half])
        better, tie, worse = outcomes.log_softmax(0).unbind(0)
        return better, tie, worse

    def threshold_of(self, share: float) -> float:
        return 2 * share / (1 - share)
