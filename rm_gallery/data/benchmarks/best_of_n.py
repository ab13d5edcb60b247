"""Best of n: how good the response with the highest reward is, out of several responses to a prompt."""

# G groups, R responses, K responses of one group

from __future__ import annotations

from typing import Any

import numpy as np

MAX_CURVE = 64


def best_of_n(rewards: np.ndarray, quality: np.ndarray, first: np.ndarray) -> dict[str, Any]:
    """What choosing the response of the highest reward gives, and what it costs.

    rewards, quality: [R]. first: [G + 1] where the responses of each group begin; groups without a known quality are
    removed by the caller. Responses that share the highest reward are chosen with the same probability.
    accuracy: probability that a best response is chosen. regret: quality of the best response minus the expected
    quality of the chosen one, which is how much best-of-n sampling loses to a perfect model; random_regret: the same
    for a random choice. normalized_regret: their ratio, 0 for a perfect model and 1 for chance.
    """
    starts, sizes = first[:-1], np.diff(first)
    top = rewards == np.repeat(np.maximum.reduceat(rewards, starts), sizes)
    best = np.maximum.reduceat(quality, starts)
    tied = np.add.reduceat(top.astype(np.float64), starts)
    chosen = np.add.reduceat(np.where(top, quality, 0.0), starts) / tied
    is_best = quality == np.repeat(best, sizes)
    right = np.add.reduceat((top & is_best).astype(np.float64), starts) / tied
    regret, random_regret = best - chosen, best - np.add.reduceat(quality, starts) / sizes
    mean_random = float(random_regret.mean())
    return {
        "n": len(sizes),
        "responses": [int(sizes.min()), int(sizes.max())],
        "accuracy": float(right.mean()),
        "chance": float((np.add.reduceat(is_best.astype(np.float64), starts) / sizes).mean()),
        "regret": float(regret.mean()),
        "random_regret": mean_random,
        "normalized_regret": float(regret.mean()) / mean_random if mean_random else None,
        "curve": curve(rewards, quality, first),
    }


def curve(rewards: np.ndarray, quality: np.ndarray, first: np.ndarray) -> list[dict[str, float]]:
    """Expected quality of the chosen response by k, when k of a group's responses are drawn without replacement.

    Exact instead of sampled: with the responses sorted by falling reward, the one at place j (from 0) is the highest of
    the drawn ones with probability C(K - 1 - j, k - 1) / C(K, k), the count behind the unbiased pass@k (Chen et al.
    2021, arXiv 2107.03374, section 2.1). `best` is the same for a perfect model; k ends at the smallest group.
    """
    sizes = np.diff(first)
    limit = int(min(sizes.min(), MAX_CURVE))
    sums = np.zeros((2, limit))
    group = np.repeat(np.arange(len(sizes)), sizes)
    for size in np.unique(sizes):
        members = np.isin(group, np.flatnonzero(sizes == size))
        weights = _top_probabilities(int(size), limit)
        for row, order_by in enumerate((rewards, quality)):
            values = _averaged_ties(order_by[members], quality[members], group[members])
            keys = order_by[members].reshape(-1, size)
            ordered = np.take_along_axis(values.reshape(-1, size), np.argsort(-keys, axis=1, kind="stable"), axis=1)
            sums[row] += (ordered @ weights.T).sum(axis=0)
    return [
        {"k": k + 1, "chosen": float(sums[0, k] / len(sizes)), "best": float(sums[1, k] / len(sizes))}
        for k in range(limit)
    ]


def _top_probabilities(size: int, limit: int) -> np.ndarray:
    """[limit, K] probability of each place to be the highest of k = 1, 2, ... drawn responses."""
    weights = np.zeros((limit, size))
    for k in range(1, limit + 1):
        weights[k - 1, 0] = k / size
        for place in range(1, size - k + 1):  # C(K-1-j, k-1) / C(K-j, k-1) = (K-j-k+1) / (K-j)
            weights[k - 1, place] = weights[k - 1, place - 1] * (size - place - k + 1) / (size - place)
    return weights


def _averaged_ties(keys: np.ndarray, values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The values, with those of equal keys in a group replaced by their mean: any of them may be drawn as the top."""
    order = np.lexsort((keys, group))
    changes = np.empty(len(keys), bool)
    changes[:1] = True
    changes[1:] = (np.diff(keys[order]) != 0) | (np.diff(group[order]) != 0)
    block = np.cumsum(changes) - 1
    means = np.bincount(block, weights=values[order]) / np.bincount(block)
    averaged = np.empty(len(values))
    averaged[order] = means[block]
    return averaged


def auc(rewards: np.ndarray, is_correct: np.ndarray) -> float | None:
    """Area under the ROC curve: P(reward of a correct response > reward of a wrong one), a tie counting half.

    The Mann-Whitney form (Hanley and McNeil 1982, Radiology 143:29-36). None without responses of both kinds.
    """
    num_correct = int(is_correct.sum())
    num_wrong = len(is_correct) - num_correct
    if not num_correct or not num_wrong:
        return None
    total = float(ranks(rewards)[is_correct].sum())
    return (total - num_correct * (num_correct + 1) / 2) / (num_correct * num_wrong)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
