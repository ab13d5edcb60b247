"""Objectives with ties: their formulas, the start of the threshold, gradients, extreme rewards, metrics."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from rm_gallery.data.batching.packed_batch import PackedBatch, collate
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.tokenization.token_group import Origin, TokenGroup
from rm_gallery.objectives import build_objective
from rm_gallery.objectives.ties import TieObjective
from rm_gallery.schema import Comparison
from tests.objectives.test_pairwise import ranked_groups, sums_for

NAMES = ("rao_kupper", "davidson")


def with_threshold(name: str, threshold: float) -> TieObjective:
    objective = build_objective(name)
    assert isinstance(objective, TieObjective)
    objective.log_threshold.data = torch.tensor(math.log(threshold), dtype=torch.float64)
    return objective


def two(tied: bool, weight: float = 1.0) -> PackedBatch:
    tails = [np.array([place], np.int32) for place in range(2)]
    return collate([TokenGroup(np.zeros(0, np.int32), tails, [Comparison(0, 1, weight, tied=tied)])])


def by_hand(name: str, d: float, threshold: float) -> tuple[float, float, float]:
    """Probability of better, tie, worse, in the strengths pi = exp(r) of the papers."""
    i, j = math.exp(d), 1.0
    if name == "davidson":
        total = i + j + threshold * math.sqrt(i * j)
        return i / total, threshold * math.sqrt(i * j) / total, j / total
    theta = math.exp(threshold)
    tie = i * j * (theta**2 - 1) / ((i + theta * j) * (theta * i + j))
    return i / (i + theta * j), tie, j / (theta * i + j)


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_the_papers_and_gradients_are_exact(name: str) -> None:
    for d, threshold in ((1.0, 0.5), (-2.0, 1.0), (0.0, 3.0)):
        better, tie, worse = by_hand(name, d, threshold)
        assert better + tie + worse == pytest.approx(1)
        objective = with_threshold(name, threshold)
        rewards = torch.tensor([d, 0.0], dtype=torch.float64, requires_grad=True)
        assert objective(rewards, two(False))[0].item() == pytest.approx(-math.log(better))
        assert objective(rewards, two(True, 2.0))[0].item() == pytest.approx(-2 * math.log(tie))
        for tied in (False, True):
            loss = partial(objective.loss, batch=two(tied))
            assert torch.autograd.gradcheck(lambda values, _, f=loss: f(values), (rewards, objective.log_threshold))


@pytest.mark.parametrize("name", NAMES)
def test_extreme_rewards_stay_finite_and_an_empty_batch_reaches_the_threshold(name: str) -> None:
    for d in (1e4, -1e4, 0.0):
        for tied in (False, True):
            objective = build_objective(name)
            rewards = torch.tensor([d, 0.0], requires_grad=True)
            loss, sums = objective(rewards, two(tied))
            loss.backward()
            gradients = [rewards.grad, objective.parameters()["log_threshold"].grad]
            assert all(each is not None and torch.isfinite(each).all() for each in (loss, *gradients, *sums.values()))
    objective = build_objective(name)
    loss, sums = objective(torch.zeros(0, requires_grad=True), collate([]))
    loss.backward()
    gradient = objective.parameters()["log_threshold"].grad
    assert loss.item() == 0 and gradient is not None and gradient.item() == 0
    assert objective.means({name: float(each) for name, each in sums.items()}, "val") == {}


@pytest.mark.parametrize("name", NAMES)
def test_the_threshold_starts_at_the_share_of_ties(name: str) -> None:
    tails = [np.array([place], np.int32) for place in range(2)]
    groups = [TokenGroup(np.zeros(0, np.int32), tails, [Comparison(0, 1, tied=row < 3)]) for row in range(10)]
    objective = build_objective(name)
    objective.start(TokenData.from_groups((group, Origin()) for group in groups))
    assert isinstance(objective, TieObjective)
    _, tie, _ = objective.log_probabilities(torch.zeros(1))
    assert tie.exp().item() == pytest.approx(0.3)
    threshold = objective.record({"log_threshold": objective.log_threshold})["threshold"]
    assert threshold == pytest.approx(2 * math.atanh(0.3) if name == "rao_kupper" else 0.6 / 0.7)


@pytest.mark.parametrize("name", NAMES)
def test_metrics_count_ties_apart(name: str) -> None:
    objective = with_threshold(name, 1.5)
    tails = [np.array([place], np.int32) for place in range(4)]
    pairs = [Comparison(0, 1), Comparison(1, 2), Comparison(2, 3, tied=True), Comparison(0, 3, tied=True)]
    batch = collate([TokenGroup(np.zeros(0, np.int32), tails, pairs)])
    sums = objective(torch.tensor([5.0, 0.0, 1.0, 1.0], dtype=torch.float64), batch)[1]
    found = objective.means({name: float(each) for name, each in sums.items()}, "val")
    assert found["val/accuracy"] == 0.5, "of the two comparisons without a tie"
    assert found["val/accuracy_with_ties"] == 0.5, "5 > 0, and 1 = 1"
    assert found["val/margin"] == 2.0 and found["val/reward_chosen"] == 2.5 and found["val/tie_share"] == 0.5
    likelihood = sum(math.log(by_hand(name, d, 1.5)[1]) for d in (0.0, 4.0)) / 2
    assert found["val/tie_log_likelihood"] == pytest.approx(likelihood)
    assert found["val/threshold"] == pytest.approx(1.5)


def test_sums_do_not_depend_on_micro_batches_sharing_and_ranks() -> None:
    groups: list[tuple[TokenGroup, Any]] = []
    for group, origin in ranked_groups():
        each = [
            Comparison(c.better, c.worse, c.weight, tied=place % 3 == 1) for place, c in enumerate(group.comparisons)
        ]
        groups.append((TokenGroup(group.prefix, group.tails, each), origin))
    data = TokenData.from_groups(groups)
    assert 0 < data.num_tied < data.num_comparisons and data[0].comparisons == groups[0][0].comparisons
    for name in NAMES:
        found = sums_for(name, {"center_coefficient": 0.1}, data)
        for other in found[1:]:
            assert other == pytest.approx(found[0], rel=1e-5)
