"""Length bias: how far rewards follow the lengths of responses, and accuracy with the length controlled for."""

# C comparisons, R responses

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rm_gallery.data.benchmarks.best_of_n import ranks
from rm_gallery.evaluation.metrics import Z, sigmoid, wilson

SCATTER = 500
"""Comparisons in the sample of the scatter plot."""


def length_report(
    margins: np.ndarray,
    better: np.ndarray,
    worse: np.ndarray,
    rewards: np.ndarray,
    lengths: np.ndarray,
    clusters: np.ndarray | None,
    *,
    seed: int,
) -> dict[str, Any]:
    """Accuracy by which response is longer, correlations with length, and length-controlled accuracy.

    margins: [C]. better, worse: [C] characters of the two responses. rewards, lengths: [R] of all responses.
    correlation: Spearman's, of reward with length over all responses. margin_correlation: of margin with difference of
    length over the comparisons, about 0 (a comparison read from its other side changes the sign of both).
    sample: [difference of length, margin] of at most 500 comparisons.
    """
    difference = (better - worse).astype(np.float64)
    norm = math.sqrt(float((margins**2).sum()) * float((difference**2).sum()))
    chosen = np.arange(len(margins))
    if len(chosen) > SCATTER:
        chosen = np.sort(np.random.default_rng([seed, 8]).choice(len(margins), SCATTER, replace=False))
    return {
        "unit": "characters",
        "longer_is_better": float((difference > 0).mean()),
        "when_longer_is_better": _part(margins, difference > 0),
        "when_shorter_is_better": _part(margins, difference < 0),
        "correlation": spearman(rewards, lengths),
        "margin_correlation": float((margins * difference).sum() / norm) if norm else None,
        "controlled": controlled_accuracy(margins > 0, difference, clusters),
        "sample": [[int(difference[each]), float(margins[each])] for each in chosen],
    }


def _part(margins: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    """Accuracy on some of the comparisons; None without any."""
    count = int(mask.sum())
    right = float((margins[mask] > 0).sum())
    low, high = wilson(right, count)
    return {"n": count, "accuracy": right / count if count else None, "interval": [low, high] if count else None}


def controlled_accuracy(correct: np.ndarray, difference: np.ndarray, clusters: np.ndarray | None) -> dict[str, Any]:
    """The accuracy that a logistic regression predicts for responses of equal length.

    correct: [C] bool. difference: [C] length of the better response minus that of the worse one. The regression is of
    `correct` on tanh(difference / its standard deviation), the length term of length-controlled AlpacaEval (Dubois et
    al. 2024, arXiv 2404.04475, section 3); the result is the sigmoid of the intercept. The slope has an L2 penalty of
    1/2, which keeps it finite for a model whose verdict is the length alone. The 95% interval is that of the intercept,
    with standard errors that are robust to repeated prompts (Liang and Zeger 1986, Biometrika 73:13-22).
    """
    count, right = len(correct), int(correct.sum())
    if right in (0, count):
        return {"accuracy": right / count, "interval": list(wilson(right, count)), "slope": 0.0}
    spread = float(np.sqrt(np.mean(difference**2)))
    inputs = np.tanh(difference / spread) if spread else np.zeros(count)
    design = np.stack([np.ones(count), inputs], axis=1)
    penalty = np.array([0.0, 1.0])
    weights = np.zeros(2)
    target = correct.astype(np.float64)
    for _ in range(100):
        predicted = sigmoid(design @ weights)
        gradient = design.T @ (target - predicted) - penalty * weights
        curvature = (design * (predicted * (1 - predicted))[:, None]).T @ design + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        step *= min(1.0, 2.0 / max(np.abs(step).max(), 1e-12))  # far from the optimum, full steps may diverge
        weights += step
        if np.abs(step).max() < 1e-10:
            break
    scores = design * (target - sigmoid(design @ weights))[:, None]
    if clusters is not None:
        scores = np.stack([np.bincount(clusters, weights=scores[:, column]) for column in range(2)], axis=1)
    inverse = np.linalg.inv(curvature)
    error = math.sqrt(max(0.0, float((inverse @ (scores.T @ scores) @ inverse)[0, 0])))
    low, middle, high = sigmoid(weights[0] + np.array([-Z, 0.0, Z]) * error)
    return {"accuracy": float(middle), "interval": [float(low), float(high)], "slope": float(weights[1])}


def spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    """Spearman's rank correlation; None if either is constant."""
    one, two = ranks(first), ranks(second)
    one, two = one - one.mean(), two - two.mean()
    norm = math.sqrt(float((one**2).sum()) * float((two**2).sum()))
    return float((one * two).sum() / norm) if norm else None
