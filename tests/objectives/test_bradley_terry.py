"""The Bradley-Terry loss against its formula in float64, and edge cases."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rm_gallery.data.batching.packed_batch import PackedBatch, collate
from rm_gallery.data.tokenization.token_group import TokenGroup
from rm_gallery.objectives.bradley_terry import bradley_terry
from rm_gallery.schema import Comparison


def batch_of(*comparisons: Comparison, responses: int = 2) -> PackedBatch:
    tails = [np.array([number], np.int32) for number in range(responses)]
    return collate([TokenGroup(np.zeros(0, np.int32), tails, comparisons)])


def test_the_loss_is_the_sum_of_negative_log_sigmoids_of_margins() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        rewards = torch.randn(4, generator=draw) * 5
        comparisons = [Comparison(0, 1, 0.5), Comparison(0, 2, 2.0), Comparison(3, 1)]
        loss, sums = bradley_terry(rewards, batch_of(*comparisons, responses=4))
        r = rewards.double().tolist()
        naive = sum(each.weight * math.log1p(math.exp(r[each.worse] - r[each.better])) for each in comparisons)
        assert loss.item() == pytest.approx(naive, rel=1e-5)
        assert sums["loss"].item() == loss.item()


def test_equal_rewards_cost_log_2() -> None:
    loss, _ = bradley_terry(torch.zeros(2), batch_of(Comparison(0, 1)))
    assert loss.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(("margin", "expected", "slope"), [(1e4, 0.0, 0.0), (-1e4, 1e4, -1.0)])
def test_extreme_margins_give_finite_losses_and_gradients(margin: float, expected: float, slope: float) -> None:
    rewards = torch.tensor([margin, 0.0], requires_grad=True)
    loss, _ = bradley_terry(rewards, batch_of(Comparison(0, 1)))
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert rewards.grad is not None
    assert rewards.grad.tolist() == pytest.approx([slope, -slope])


def test_only_the_difference_of_rewards_counts() -> None:
    batch = batch_of(Comparison(0, 1))
    first, _ = bradley_terry(torch.tensor([1.0, 3.0]), batch)
    second, _ = bradley_terry(torch.tensor([101.0, 103.0]), batch)
    assert first.item() == second.item()


def test_a_weight_scales_the_loss_of_its_comparison() -> None:
    batch = batch_of(Comparison(0, 1))
    rewards = torch.tensor([0.3, 1.2])
    once, _ = bradley_terry(rewards, batch)
    twice, _ = bradley_terry(rewards, replace(batch, weight=torch.tensor([2.0])))
    assert twice.item() == pytest.approx(2 * once.item())


def test_without_comparisons_the_loss_is_zero_and_part_of_the_graph() -> None:
    rewards = torch.zeros(0, requires_grad=True)
    loss, sums = bradley_terry(rewards, collate([]))
    loss.backward()
    assert loss.item() == 0.0
    assert sums["comparisons"].item() == 0.0
    assert not any(value.requires_grad for value in sums.values())
