"""Bradley-Terry with ties, by a threshold on the difference of reward."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rm_gallery.objectives.ties import TieObjective


@dataclass(frozen=True)
class RaoKupper(TieObjective):
    """Responses tie where the difference of their rewards is within a threshold of what annotators can tell apart.

    With d = r_i - r_j and the threshold t > 0 (Rao and Kupper 1967, "Ties in Paired-Comparison Experiments: A
    Generalization of the Bradley-Terry Model", whose theta is exp(t)):

    - P(i preferred to j) = sigmoid(d - t)
    - P(j preferred to i) = sigmoid(-d - t)
    - P(tie) = 1 - both = (exp(2 t) - 1) sigmoid(d - t) sigmoid(-d - t)

    A threshold of 0 is Bradley-Terry without ties. Starts at t = 2 artanh(s), s the share of ties.

    Needs comparisons that are ties, see `TieObjective`. Use it where annotators could answer "about the same".
    `davidson` differs in how fast ties become rare as d grows.

    Example: d = 1, t = 0.5: preferred -log sigmoid(0.5) = 0.474, tie -log(1.718 x 0.622 x 0.182) = 1.635.
    """

    def log_probabilities(self, differences: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        threshold = self.log_threshold.exp()
        better, worse = F.logsigmoid(differences - threshold), F.logsigmoid(-differences - threshold)
        # log(exp(2 t) - 1), which overflows for no t.
        factor = 2 * threshold + torch.log(-torch.expm1(-2 * threshold))
        return better, factor + better + worse, worse

    def threshold_of(self, share: float) -> float:
        return 2 * math.atanh(share)
