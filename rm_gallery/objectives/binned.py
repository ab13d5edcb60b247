"""Regression of a score as cross-entropy over bins, by one reward and learned cut points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.errors import UserError
from rm_gallery.objectives.regression import Regression

# S ratings, B bins


@dataclass(frozen=True)
class BinnedRegression(Regression):
    """Cross-entropy between the bin of a score and the probabilities of the bins, which follow from one reward.

    P(score is in one of the bins 0 to k) = sigmoid(c_k - r), with cut points c_0 < c_1 < ... (proportional odds:
    McCullagh 1980, "Regression Models for Ordinal Data"). Bins are `bins` equally spaced scores from the lowest to the
    highest of the training data. A score between two has a target in both, in proportion (two-hot). Cut points are
    trained with the model at `objective.threshold_lr`. They start where responses of equal reward have the bins of the
    training data.

    Rewards are log-odds, as those of Bradley-Terry: a difference of 1 multiplies the odds of a higher bin by e. They
    are not in the unit of the scores. The expected score, sum over bins of score x probability, is; `mse` and `pearson`
    are of it. Cut points and bins are in config.json.

    Why not an output per bin, as in HL-Gauss (Farebrother et al. 2024, "Stop Regressing: Training Value Functions via
    Classification for Scalable Deep RL"): the reward would be an expectation over the outputs, which no program that
    loads a classifier with one label computes. A histogram of fixed width around the reward would be the squared error
    again. With cut points the checkpoint stays a model with one reward, whose logit is what was trained.

    Needs a score of each response, as `Regression`. Use it for grades in few steps, whose distances are not known to be
    equal, or where outliers dominate the squared error.

    Example: cut points -1 and 1, r = 0.5: probabilities sigmoid(-1.5) = 0.182, 0.440, sigmoid(-0.5) = 0.378; a score in
    the highest bin has the loss -log 0.378 = 0.974.
    """

    bins: int = 2
    low: float = field(init=False, default=0.0)
    """The score of the first bin."""
    step: float = field(init=False, default=1.0)
    """The difference between the scores of two bins."""
    cuts: nn.Parameter = field(init=False, repr=False, compare=False)
    """[B - 1]: the first cut point, and the logarithms of the differences between each and the one before it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "cuts", nn.Parameter(torch.zeros(self.bins - 1)))

    def log_probabilities(self, rewards: Tensor) -> Tensor:
        """[S, B] of each bin. rewards: [S]."""
        cuts, gaps = _cut_points(self.cuts)
        above = rewards.unsqueeze(1) - cuts
        low, high = F.logsigmoid(-above), F.logsigmoid(above)
        inner = low[:, 1:] + high[:, :-1] + torch.log(-torch.expm1(-gaps))
        return torch.cat([low[:, :1], inner, high[:, -1:]], 1)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        place = ((labels - self.low) / self.step).clamp(0, self.bins - 1)  # [S, 1]; validation may exceed the range
        lower = place.floor().clamp(max=self.bins - 2)
        share, index = place - lower, lower.long()
        found = self.log_probabilities(outputs.squeeze(1))
        return -(1 - share) * found.gather(1, index) - share * found.gather(1, index + 1)

    def predicted(self, outputs: Tensor) -> Tensor:
        """[S, 1]: expected scores."""
        scores = self.low + self.step * torch.arange(self.bins, dtype=outputs.dtype, device=outputs.device)
        return (self.log_probabilities(outputs.squeeze(1)).exp() @ scores).unsqueeze(1)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {"cuts": self.cuts}

    def start(self, data: TokenData) -> None:
        scores = data.known_attributes().astype(np.float64)
        low, high = float(scores.min()), float(scores.max())
        if low == high:
            raise UserError(f"data.train_files: every score is {low:g}, so objective.bins={self.bins} has one bin")
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "step", (high - low) / (self.bins - 1))
        place = (scores - low) / self.step
        lower = np.minimum(np.floor(place), self.bins - 2).astype(np.int64)
        counts = np.bincount(lower, 1 - (place - lower), minlength=self.bins)
        counts += np.bincount(lower + 1, place - lower, minlength=self.bins)
        shares = np.cumsum(counts + 0.5)[:-1] / (counts + 0.5).sum()  # no bin has probability 0
        cuts = np.log(shares) - np.log1p(-shares)
        with torch.no_grad():
            self.cuts.copy_(torch.from_numpy(np.concatenate([cuts[:1], np.log(np.diff(cuts))])))

    def record(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        cuts, _ = _cut_points(values["cuts"].double())
        return {"scores": [self.low + self.step * place for place in range(self.bins)], "cut_points": cuts.tolist()}


def _cut_points(values: Tensor) -> tuple[Tensor, Tensor]:
    """[B - 1] cut points, and [B - 2] differences between them."""
    gaps = values[1:].exp()
    return values[:1] + F.pad(gaps.cumsum(0), (1, 0)), gaps
