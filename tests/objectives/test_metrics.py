"""Metrics: sums divided once, ties, and no comparisons."""

from __future__ import annotations

import pytest
import torch

from rm_gallery.objectives.metrics import Sums, means, pairwise_sums


def summed(better: list[float], worse: list[float]) -> dict[str, float]:
    sums = Sums()
    sums.add({"loss": torch.zeros(()), **pairwise_sums(torch.tensor(better), torch.tensor(worse))})
    return means(sums.read(), "val")


def test_accuracy_and_means_over_comparisons() -> None:
    found = summed([2.0, 1.0, 4.0], [1.0, 3.0, 0.0])
    assert found["val/accuracy"] == pytest.approx(2 / 3)
    assert found["val/margin"] == pytest.approx(1.0)
    assert found["val/reward_chosen"] == pytest.approx(7 / 3)
    assert found["val/reward_rejected"] == pytest.approx(4 / 3)


def test_a_tie_counts_as_wrong() -> None:
    assert summed([1.0, 2.0], [1.0, 1.0])["val/accuracy"] == 0.5


def test_the_mean_is_over_comparisons_not_over_batches() -> None:
    sums = Sums()
    for better, worse in (([1.0] * 9, [0.0] * 9), ([0.0], [1.0])):
        part = Sums()
        part.add({"loss": torch.zeros(()), **pairwise_sums(torch.tensor(better), torch.tensor(worse))})
        sums.merge(part)
    assert means(sums.read(), "val")["val/accuracy"] == pytest.approx(0.9)


def test_small_values_are_not_lost_in_a_large_sum() -> None:
    sums = Sums()
    sums.add({"x": torch.tensor(2.0**24)})
    for _ in range(10):
        sums.add({"x": torch.tensor(1.0)})  # float32 would stay at 2 ** 24
    assert sums.read() == {"x": 2.0**24 + 10}


def test_read_resets_the_sums() -> None:
    sums = Sums()
    sums.add({"x": torch.tensor(1.0)})
    assert sums.read() == {"x": 1.0}
    assert sums.read() == {}


@pytest.mark.parametrize("sums", [{}, {"comparisons": 0.0, "loss": 0.0}])
def test_no_comparisons_give_no_metrics(sums: dict[str, float]) -> None:
    assert means(sums, "train") == {}
