"""Regression over bins: probabilities by hand, two-hot targets, the start of the cut points, gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rm_gallery.data.batching.packed_batch import PackedBatch, collate
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.tokenization.token_group import Origin, TokenGroup
from rm_gallery.errors import UserError
from rm_gallery.objectives import build_objective
from rm_gallery.objectives.binned import BinnedRegression
from rm_gallery.schema import Rating


def graded(*scores: float, weight: float = 1.0) -> TokenGroup:
    tails = [np.array([place], np.int32) for place in range(len(scores))]
    ratings = [Rating(place, attributes=(score,), weight=weight) for place, score in enumerate(scores)]
    return TokenGroup(np.zeros(0, np.int32), tails, (), ratings)


def started(bins: int, *scores: float) -> BinnedRegression:
    objective = build_objective("regression", (), {"bins": bins})
    assert isinstance(objective, BinnedRegression)
    objective.start(TokenData.from_groups([(graded(*scores), Origin())]))
    objective.cuts.data = objective.cuts.data.double()
    return objective


def one(score: float) -> PackedBatch:
    return collate([graded(score)])


def test_probabilities_are_differences_of_sigmoids_and_targets_two_hot() -> None:
    objective = started(3, 0, 2, 4)
    objective.cuts.data = torch.tensor([-1.0, math.log(2.0)], dtype=torch.float64)  # cut points -1 and 1
    s = [1 / (1 + math.exp(-x)) for x in (-1.5, 0.5)]
    chances = [s[0], s[1] - s[0], 1 - s[1]]
    reward = torch.tensor([0.5], dtype=torch.float64)
    assert objective.log_probabilities(reward).exp().tolist()[0] == pytest.approx(chances)
    for score, place, share in ((0, 0, 0), (2, 1, 0), (4, 1, 1), (3, 1, 0.5), (9, 1, 1), (-9, 0, 0)):
        loss = -(1 - share) * math.log(chances[place]) - share * math.log(chances[place + 1])
        assert objective(reward, one(score))[0].item() == pytest.approx(loss), score
    assert objective.predicted(reward.unsqueeze(1)).item() == pytest.approx(2 * chances[1] + 4 * chances[2])
    assert objective.record({"cuts": objective.cuts})["cut_points"] == pytest.approx([-1, 1])
    assert objective.record({"cuts": objective.cuts})["scores"] == [0, 2, 4]


def test_cut_points_start_at_the_shares_of_the_training_data() -> None:
    objective = started(5, *[0] * 10, *[1] * 20, *[3] * 30, *[4] * 40, math.nan)
    shares = [10.5 / 102.5, 20.5 / 102.5, 0.5 / 102.5, 30.5 / 102.5, 40.5 / 102.5]
    assert objective.log_probabilities(torch.zeros(1)).exp().tolist()[0] == pytest.approx(shares)
    with pytest.raises(UserError, match=r"every score is 2, so objective.bins=3 has one bin"):
        started(3, 2, 2)


def test_gradients_and_extreme_rewards() -> None:
    objective = started(4, 0, 1, 2, 3, 3)
    batch = collate([graded(0, 1.5, 3, math.nan, weight=2.0)])
    rewards = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda values, _: objective.loss(values, batch), (rewards, objective.cuts))
    for scale in (1e4, -1e4):
        extreme = torch.full((4,), scale, requires_grad=True)
        loss, sums = objective(extreme, batch)
        loss.backward()
        found = [loss, extreme.grad, objective.cuts.grad, *sums.values()]
        assert all(each is not None and torch.isfinite(each).all() for each in found)
    objective.cuts.grad = None
    loss, _ = objective(torch.zeros(0, requires_grad=True), collate([]))
    loss.backward()
    assert loss.item() == 0 and objective.cuts.grad is not None
