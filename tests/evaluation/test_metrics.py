"""Every metric against a figure computed by hand, ties among them."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from rm_gallery.data.benchmarks.best_of_n import auc, best_of_n
from rm_gallery.evaluation import metrics
from rm_gallery.evaluation.compare import compare
from rm_gallery.evaluation.length import controlled_accuracy, length_report, spearman
from tests.evaluation.tables import make_table


def _array(*values: float) -> np.ndarray:
    return np.array(values, float)


def test_accuracy_counts_a_tie_as_wrong() -> None:
    found = metrics.accuracy(_array(1, -2, 0, 3), None, seed=0)
    assert (found["n"], found["accuracy"], found["ties"]) == (4, 0.5, 1)
    assert (found["mean_margin"], found["median_margin"]) == (0.5, 0.5)
    assert found["interval_method"] == "wilson"


def test_wilson_interval() -> None:
    # (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) for 8 of 10
    assert metrics.wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert metrics.wilson(0, 0) == (0.0, 1.0)
    assert metrics.wilson(5, 5)[1] == 1.0


def test_repeated_prompts_are_resampled_as_a_whole() -> None:
    # Ten comparisons of each of 20 prompts, all right or all wrong: the error is that of 20 observations, not of 200.
    correct, prompts = np.repeat(np.arange(20) % 2, 10).astype(float), np.repeat(np.arange(20), 10)
    clusters = metrics.clusters_of(prompts, np.arange(200))
    interval = metrics.accuracy_interval(correct, clusters, seed=0)
    assert interval.method == "bootstrap by prompt"
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 20), rel=0.1)
    assert metrics.clusters_of(np.arange(20), np.arange(20)) is None
    assert metrics.clusters_of(np.zeros(20), np.arange(20)) is None, "a constant instruction is no cluster"
    rows = np.repeat(np.arange(5), 4)
    clusters = metrics.clusters_of(np.zeros(20), rows)
    assert clusters is not None and clusters.tolist() == rows.tolist(), "comparisons of a ranking are dependent"


def test_calibration() -> None:
    right, wrong = math.log(3), -math.log(3)  # confidence 0.75
    found = metrics.calibration(_array(right, wrong), np.ones(2))
    assert found["brier"] == pytest.approx((0.25**2 + 0.75**2) / 2)
    assert found["log_loss"] == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    assert found["ece"] == pytest.approx(0.25)  # confidence 0.75, accuracy 0.5
    assert [row["n"] for row in found["reliability"]] == [0, 0, 0, 0, 0, 2, 0, 0, 0, 0]
    tie = metrics.calibration(_array(0, 0), np.ones(2))
    assert tie["ece"] == 0 and tie["brier"] == 0.25, "a tie is right half of the time, at confidence 0.5"


def test_fitted_temperature_makes_confidence_equal_accuracy() -> None:
    margins = _array(2, 2, 2, -2)  # three of four right: sigmoid(2 / T) = 0.75
    temperature, note = metrics.fit_temperature(margins, np.ones(4))
    assert temperature == pytest.approx(2 / math.log(3)) and not note
    assert metrics.fit_temperature(_array(1, -1), np.ones(2)) == (None, "the mean margin is not positive")
    assert metrics.fit_temperature(_array(1, 2), np.ones(2)) == (None, "no pair is wrong")
    soft, _ = metrics.fit_temperature(_array(2, 2), _array(0.75, 0.75))
    assert soft == pytest.approx(2 / math.log(3)), "shares of annotators are targets"


@pytest.mark.slow  # imports scikit-learn
def test_length_controlled_accuracy_equals_a_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    draw = np.random.default_rng(0)
    difference = draw.normal(0, 50, 400)
    correct = draw.random(400) < metrics.sigmoid(0.3 + 0.02 * difference)
    inputs = np.tanh(difference / np.sqrt(np.mean(difference**2)))
    fitted = LogisticRegression(C=1.0, tol=1e-10).fit(inputs[:, None], correct)
    found = controlled_accuracy(correct, difference, None)
    assert found["accuracy"] == pytest.approx(1 / (1 + math.exp(-fitted.intercept_[0])), abs=1e-5)
    assert found["slope"] == pytest.approx(fitted.coef_[0, 0], abs=1e-4)
    assert found["interval"][0] < found["accuracy"] < found["interval"][1]


def test_length_report_of_a_model_that_prefers_the_longer_response() -> None:
    better, worse = np.array([30, 10, 20, 5]), np.array([10, 30, 20, 9])
    margins = (better - worse).astype(float)
    rewards = np.concatenate([better, worse]).astype(float)
    found = length_report(margins, better, worse, rewards, np.concatenate([better, worse]), None, seed=0)
    assert found["when_longer_is_better"]["accuracy"] == 1 and found["when_longer_is_better"]["n"] == 1
    assert found["when_shorter_is_better"]["accuracy"] == 0 and found["when_shorter_is_better"]["n"] == 2
    assert found["correlation"] == pytest.approx(1) and found["margin_correlation"] == pytest.approx(1)


def test_spearman_averages_the_ranks_of_ties() -> None:
    # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: sums of products of deviations 4.5 and squares 4.5, 5
    assert spearman(_array(1, 2, 2, 3), _array(1, 3, 2, 4)) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman(_array(1, 1), _array(1, 2)) is None


def test_best_of_n_by_hand() -> None:
    rewards = _array(3, 1, 2, 5, 5, 0)
    quality = _array(0, 1, 2, 4, 0, 2)
    found = best_of_n(rewards, quality, np.array([0, 3, 6]))
    # First prompt: quality 0 chosen of at most 2. Second: 4 or 0, each with probability 1/2.
    assert found["accuracy"] == pytest.approx((0 + 0.5) / 2)
    assert found["regret"] == pytest.approx((2 + 2) / 2)
    assert found["random_regret"] == pytest.approx(((2 - 1) + (4 - 2)) / 2)
    # k = 2, first prompt: by reward 0, 2, 1 with weights 2/3, 1/3, 0; second: 2, 2 (tied), 2 with the same weights.
    assert [row["chosen"] for row in found["curve"]] == pytest.approx([(1 + 2) / 2, (2 / 3 + 2) / 2, (0 + 2) / 2])
    assert [row["best"] for row in found["curve"]] == pytest.approx([1.5, (5 / 3 + 10 / 3) / 2, 3])


def test_auc_counts_ties_half() -> None:
    assert auc(_array(3, 1, 1, 0), np.array([True, True, False, False])) == pytest.approx((2 + 0.5 + 1) / 4)
    assert auc(_array(1, 2), np.array([True, True])) is None


def test_mcnemar_is_the_exact_binomial_test() -> None:
    assert metrics.mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 64)
    assert metrics.mcnemar(0, 0) == 1 and metrics.mcnemar(3, 3) == 1
    assert metrics.mcnemar(40_000, 41_000) == pytest.approx(0.00044, rel=0.02)


def test_comparison_of_two_models() -> None:
    table, _ = make_table([("", "", 1, [0.0, 0.0])] * 100)
    first, second = np.where(np.arange(100) < 60, 1.0, -1.0), np.where(np.arange(100) < 80, 1.0, -1.0)
    row = compare(("a", "b"), table, first, second, np.arange(100), seed=0)
    assert row["difference"] == pytest.approx(0.2)
    assert (row["only_first_right"], row["only_second_right"]) == (0, 20)
    assert row["interval"] == pytest.approx([0.12, 0.28], abs=0.02)
    expected = r"b is better than a by 20\.0 points \(95% interval 1\d\.0 to 2\d\.0; McNemar p = 1\.9e-06\)"
    assert re.fullmatch(expected, row["text"])
    same = compare(("a", "b"), table, first, first, np.arange(100), seed=0)
    assert same["text"] == "b and a agree on every pair" and same["p_value"] == 1
