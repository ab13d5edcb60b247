"""Regression of scores first, Bradley-Terry on the comparisons that they imply afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.objectives.attributes import rated
from rm_gallery.objectives.base import Objective
from rm_gallery.objectives.regression import Regression

# S ratings


@dataclass(frozen=True)
class RegressionThenBT(Regression):
    """A run of two phases on scores: `regression`, then Bradley-Terry on responses to a prompt whose scores differ.

    First phase: squared error to the score, or cross-entropy over `objective.bins`, of every response, those without a
    second response to their prompt too. Second phase: -log sigmoid(r_i - r_j) for each two responses of a prompt with
    scores y_i > y_j, divided by their number (after Wang et al. 2024, "HelpSteer2-Preference: Complementing Ratings
    with Preferences", who start a Bradley-Terry model from one of regression on helpfulness).
    The weight of a pair is the product of the weights of its responses, so a response of weight 2 counts as two.

    The optimizer and the learning-rate schedule run through both phases. `objective.regression_steps` or
    `regression_ratio` say where the second begins. Validation is that of the second phase all along, with `mse` and
    `pearson` of the scores, so its metrics are comparable over the whole run.

    Needs a score of each response, and prompts with two responses whose scores differ. Use it where grades exist and
    the order is what counts: grades of all responses warm up the reward, comparisons sharpen it. Rewards are log-odds
    in the end, not scores.

    Example: rewards [1, 3] with scores [2, 3]: first 1 / 2 = 0.5, then -log sigmoid(2) = 0.127.
    """

    first: Regression = field(default_factory=Regression)

    @property
    def phases(self) -> tuple[Objective, ...]:
        return self.first, self

    def loss(self, rewards: Tensor, batch: PackedBatch) -> Tensor:
        outputs, labels = rated(rewards, batch)
        rows, columns = outputs, outputs.T  # [S, 1] and [1, S]
        losses = -F.logsigmoid(rows - columns)
        if self.center_coefficient:
            losses = losses + self.center_coefficient * (rows + columns).square()
        if self.reward_l2:
            losses = losses + self.reward_l2 * (rows.square() + columns.square()) / 2
        same = batch.rated_group.unsqueeze(0) == batch.rated_group.unsqueeze(1)
        is_pair = same & (labels > labels.T)  # never with a score that is missing, NaN
        weights = batch.rating_weight.unsqueeze(0) * batch.rating_weight.unsqueeze(1)
        return (losses.where(is_pair, 0.0) * weights).sum()

    def predicted(self, outputs: Tensor) -> Tensor:
        return self.first.predicted(outputs)

    def means(self, sums: Mapping[str, float], prefix: str) -> dict[str, float]:
        """The loss over pairs, and the metrics of `regression`."""
        found, pairs = super().means(sums, prefix), sums.get("score:pairs", 0.0)
        for name in ("loss", "router_aux_loss"):
            if found.pop(f"{prefix}/{name}", None) is not None and pairs:
                found[f"{prefix}/{name}"] = sums[name] / pairs
        return found

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.first.parameters()

    def start(self, data: TokenData) -> None:
        self.first.start(data)

    def record(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        """Nothing: the second phase moves rewards away from what the cut points of the first were trained for."""
        return {}
