"""Components: which things hang together by links."""

from __future__ import annotations

import numpy as np


def connected(count: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[count] int64: for each thing the smallest index among all that links lead to.

    left, right: [L] the two ends of each link. Example: 4 things, links 0-2 and 2-3, give [0 1 0 0].
    """
    label = np.arange(count)
    while True:
        low = np.minimum(label[left], label[right])
        new = label.copy()
        # Both the ends and what they point at sink to the lower label, so that chains shorten by more than a step.
        for index in (left, right, label[left], label[right]):
            np.minimum.at(new, index, low)
        new = new[new]
        if (new == label).all():
            return label
        label = new
