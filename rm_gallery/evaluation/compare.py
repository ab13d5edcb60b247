"""Comparison of two models on the same comparisons: difference of accuracy, its interval, and where they disagree."""

# C comparisons that both models have a reward for

from __future__ import annotations

from typing import Any

import numpy as np

from rm_gallery.data.benchmarks.table import Table
from rm_gallery.evaluation.metrics import bootstrap_means, clusters_of, mcnemar, percentile_interval


def shared_comparisons(first: Table, second: Table) -> tuple[np.ndarray, np.ndarray]:
    """[C] indices of the same comparisons in both tables: models of another input style may drop other rows."""
    one, two = first.keys(), second.keys()
    if first.files == second.files and np.array_equal(one, two):
        every = np.arange(len(one))
        return every, every
    place = {(first.files[key[0]], *key[1:]): index for index, key in enumerate(one.tolist())}
    pairs = [
        (place[name], index)
        for index, key in enumerate(two.tolist())
        if (name := (second.files[key[0]], *key[1:])) in place
    ]
    found = np.array(pairs, np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def compare(
    names: tuple[str, str], table: Table, first: np.ndarray, second: np.ndarray, indices: np.ndarray, *, seed: int
) -> dict[str, Any]:
    """How much better the second model is than the first, with a paired bootstrap and McNemar's test.

    first, second: [C] margins of the two models on the comparisons `indices` of `table`.
    interval: of the difference of accuracy, from resampling the differences of single comparisons, by prompt where
    prompts repeat (the paired bootstrap: Efron and Tibshirani 1993, section 16; Koehn 2004, EMNLP).
    """
    right = first > 0, second > 0
    gain = right[1].astype(np.float64) - right[0]
    groups = table.group[indices]
    clusters = clusters_of(table.prompt[groups], groups)
    low, high = percentile_interval(bootstrap_means(gain, clusters, seed=seed)) if gain.any() else (0.0, 0.0)
    only_first, only_second = int((gain < 0).sum()), int((gain > 0).sum())
    row = {
        "models": list(names),
        "n": len(indices),
        "accuracy": [float(each.mean()) for each in right],
        "difference": float(gain.mean()),
        "interval": [low, high],
        "interval_method": "paired bootstrap" + (" by prompt" if clusters is not None else ""),
        "only_first_right": only_first,
        "only_second_right": only_second,
        "p_value": mcnemar(only_first, only_second),
    }
    return {**row, "text": sentence(row)}


def sentence(row: dict[str, Any]) -> str:
    """`b is better than a by 1.3 points (95% interval 0.4 to 2.2; McNemar p = 0.004)`."""
    first, second = row["models"]
    low, high = (100 * each for each in row["interval"])
    points, p_value = 100 * row["difference"], row["p_value"]
    p_text = f"McNemar p = {p_value:.2g}"
    if not row["only_first_right"] + row["only_second_right"]:
        return f"{second} and {first} agree on every pair"
    if low > 0:
        return (
            f"{second} is better than {first} by {points:.1f} points (95% interval {low:.1f} to {high:.1f}; {p_text})"
        )
    if high < 0:
        return (
            f"{second} is worse than {first} by {-points:.1f} points (95% interval {-high:.1f} to {-low:.1f}; {p_text})"
        )
    return (
        f"no difference between {second} and {first} can be shown: {points:+.1f} points (95% interval {low:+.1f} to "
        f"{high:+.1f}; {p_text})"
    )
