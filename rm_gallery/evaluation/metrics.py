"""Metrics of rewards: accuracy with its interval, calibration, and differences between two models.

Pure functions of arrays; every formula names its source. A margin is the reward of the better response minus the
reward of the worse one.
"""

# C comparisons, P prompts, B bootstrap resamples, N bins

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 1000
CONFIDENCE = 0.95
Z = 1.959963984540054
"""The 97.5th percentile of the normal distribution."""
CONSTANT_SHARE = 0.5
"""A prompt of more than this share of the comparisons is a constant instruction, so pairs are resampled instead."""
RELIABILITY_BINS = 10


@dataclass(frozen=True)
class Interval:
    """A 95% confidence interval."""

    low: float
    high: float
    method: str
    """`wilson`, or `bootstrap by prompt`."""


def wilson(successes: float, count: int) -> tuple[float, float]:
    """The 95% score interval of a proportion (Wilson 1927, JASA 22:209-212). (0, 1) without observations."""
    if not count:
        return 0.0, 1.0
    share, square = successes / count, Z * Z / count
    middle = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def clusters_of(prompts: np.ndarray, rows: np.ndarray) -> np.ndarray | None:
    """[C] cluster of each comparison, numbered from 0, if prompts repeat; None if comparisons are independent.

    prompts: [C] hash of the prompt. rows: [C] number of the row, which has several comparisons if it is a ranking. A
    prompt that most comparisons have in common is an instruction, not a cluster; rows are the clusters then.
    """
    for ids in (prompts, rows):
        _, clusters, counts = np.unique(ids, return_inverse=True, return_counts=True)
        if len(counts) == len(ids):
            return None
        if counts.max() <= CONSTANT_SHARE * len(ids):
            return clusters
    return None


def bootstrap_means(values: np.ndarray, clusters: np.ndarray | None, *, seed: int) -> np.ndarray:
    """[B] means of `values` [C] over resamples of whole clusters, or of single values where `clusters` is None.

    The cluster bootstrap (Field and Welsh 2007, JRSS B 69:369-390): all values of a drawn cluster are drawn.
    """
    clusters = np.arange(len(values)) if clusters is None else clusters
    sums = np.bincount(clusters, weights=values)
    counts = np.bincount(clusters).astype(np.float64)
    draw, size = np.random.default_rng([seed, 7]), len(sums)
    means = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        times = np.bincount(draw.integers(0, size, size), minlength=size)
        means[number] = times @ sums / (times @ counts)
    return means


def percentile_interval(means: np.ndarray) -> tuple[float, float]:
    """The central 95% of bootstrap means (Efron and Tibshirani 1993, chapter 13)."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def accuracy_interval(correct: np.ndarray, clusters: np.ndarray | None, *, seed: int) -> Interval:
    """Of the mean of `correct` [C]: Wilson, or bootstrap by prompt where prompts repeat."""
    if clusters is None:
        return Interval(*wilson(float(correct.sum()), len(correct)), "wilson")
    return Interval(*percentile_interval(bootstrap_means(correct, clusters, seed=seed)), "bootstrap by prompt")


def accuracy(margins: np.ndarray, clusters: np.ndarray | None, *, seed: int) -> dict[str, Any]:
    """Accuracy (a tie counts as wrong, as in training and in RewardBench), its interval, ties and margins."""
    correct = (margins > 0).astype(np.float64)
    interval = accuracy_interval(correct, clusters, seed=seed)
    return {
        "n": len(margins),
        "accuracy": float(correct.mean()),
        "interval": [interval.low, interval.high],
        "interval_method": interval.method,
        "ties": int((margins == 0).sum()),
        "mean_margin": float(margins.mean()),
        "median_margin": float(np.median(margins)),
    }


def softplus(values: np.ndarray) -> np.ndarray:
    """log(1 + exp(x)) without overflow."""
    return np.logaddexp(0.0, values)


def sigmoid(values: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return 0.5 * (1 + np.tanh(values / 2))


def calibration(margins: np.ndarray, p_better: np.ndarray) -> dict[str, Any]:
    """Whether sigmoid(margin), the Bradley-Terry probability of the better response, is a probability.

    margins: [C]. p_better: [C] share of annotators who prefer the better response; 1 where unknown.
    brier: mean of (p - p_better)^2 (Brier 1950, Monthly Weather Review 78:1-3). log_loss: the loss of training.
    ece: expected calibration error (Guo et al. 2017, ICML, equation 3) of the confidence, the probability of the
    response that the model prefers, in 10 bins from 0.5 to 1; a tie is right half of the time.
    temperature: T that minimizes the log loss of sigmoid(margin / T) (Guo et al. 2017, section 4.2) on these
    comparisons; None, with `temperature_note`, where no finite one does.
    """
    found = _probabilities(margins, p_better)
    temperature, note = fit_temperature(margins, p_better)
    found["temperature"] = temperature
    if note:
        found["temperature_note"] = note
    if temperature is not None:
        fitted = _probabilities(margins / temperature, p_better)
        found["fitted"] = {key: fitted[key] for key in ("brier", "log_loss", "ece")}
    return found


def _probabilities(margins: np.ndarray, p_better: np.ndarray) -> dict[str, Any]:
    bins = reliability(margins, p_better)
    gaps = [row["n"] * abs(row["accuracy"] - row["confidence"]) for row in bins if row["n"]]
    return {
        "brier": float(np.mean((sigmoid(margins) - p_better) ** 2)),
        "log_loss": float(np.mean(p_better * softplus(-margins) + (1 - p_better) * softplus(margins))),
        "ece": float(sum(gaps) / len(margins)),
        "reliability": bins,
    }


def reliability(margins: np.ndarray, p_better: np.ndarray) -> list[dict[str, Any]]:
    """Bins of the reliability diagram: mean confidence and accuracy by confidence, from 0.5 to 1."""
    confidence = sigmoid(np.abs(margins))
    right = np.where(margins > 0, p_better, np.where(margins < 0, 1 - p_better, 0.5))
    edges = np.linspace(0.5, 1.0, RELIABILITY_BINS + 1)
    place = np.clip(((confidence - 0.5) * 2 * RELIABILITY_BINS).astype(np.int64), 0, RELIABILITY_BINS - 1)
    counts = np.bincount(place, minlength=RELIABILITY_BINS)
    sums = [np.bincount(place, weights=each, minlength=RELIABILITY_BINS) for each in (confidence, right)]
    return [
        {
            "low": float(edges[each]),
            "high": float(edges[each + 1]),
            "n": int(counts[each]),
            "confidence": float(sums[0][each] / counts[each]) if counts[each] else None,
            "accuracy": float(sums[1][each] / counts[each]) if counts[each] else None,
        }
        for each in range(RELIABILITY_BINS)
    ]


def fit_temperature(margins: np.ndarray, p_better: np.ndarray) -> tuple[float | None, str]:
    """(T, "") or (None, why): the log loss is convex in 1 / T, so its slope is zero at one place or at none."""
    scale = float(np.abs(margins).mean())
    if scale == 0:
        return None, "all margins are 0"

    def slope(inverse: float) -> float:
        return float(np.mean(margins * (sigmoid(margins * inverse) - p_better)))

    if slope(0.0) >= 0:
        return None, "the mean margin is not positive"
    if not (np.abs(margins) * np.where(margins > 0, 1 - p_better, p_better)).any():
        return None, "no pair is wrong"
    low, high = 0.0, 1 / scale
    while slope(high) < 0:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2 / (low + high), ""


def mcnemar(only_first: int, only_second: int) -> float:
    """p value that two models are equally accurate, from the comparisons that only one of them gets right.

    The exact two-sided binomial form of the test (McNemar 1947, Psychometrika 12:153-157).
    """
    count, fewer = only_first + only_second, min(only_first, only_second)
    if not count:
        return 1.0
    steps = np.arange(1, fewer + 1)
    log_choose = np.concatenate([[0.0], np.cumsum(np.log((count - steps + 1) / steps))])
    log_tail = np.logaddexp.reduce(log_choose) - count * math.log(2)
    return float(min(1.0, 2 * math.exp(log_tail)))


def histogram(samples: dict[str, np.ndarray], *, bins: int = 40) -> dict[str, Any]:
    """Counts of several samples in the same bins; the outermost bins hold what is beyond the 0.1th percentiles."""
    joined = np.concatenate(list(samples.values()))
    low, high = (float(each) for each in np.percentile(joined, [0.1, 99.9]))
    if high <= low:
        half = max(0.5, abs(low) * 1e-6)  # bins of a large constant must differ in floating point
        low, high = low - half, high + half
    edges = np.linspace(low, high, bins + 1)
    counts = {name: np.histogram(np.clip(each, low, high), edges)[0].tolist() for name, each in samples.items()}
    return {"edges": edges.tolist(), "counts": counts}
