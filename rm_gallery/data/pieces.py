"""Pieces: the comparisons of a group that is above the token budget, cut so that each piece fits."""

from __future__ import annotations

import numpy as np

from rm_gallery.data.micro_batches import Packer
from rm_gallery.data.token_group import TokenGroup

# K responses of the group


def cut_comparisons(group: TokenGroup, packer: Packer) -> list[tuple[int, ...]]:
    """Numbers of comparisons, each in one piece; every piece repeats the common prefix.

    A piece begins with the first comparison that is left, and takes in one response after the other: the one that
    brings most comparisons for its tokens.
    """
    tails = np.array([len(tail) for tail in group.tails], np.int64)
    left = dict(enumerate(group.comparisons))
    between = np.zeros((len(tails), len(tails)), np.int64)  # [K, K] comparisons that are left
    for each in group.comparisons:
        between[[each.better, each.worse], [each.worse, each.better]] += 1
    pieces = []
    while left:
        first = next(iter(left.values()))
        inside = np.zeros(len(tails), bool)
        inside[[first.better, first.worse]] = True
        while True:
            gains = between[inside].sum(0)
            if packer.padded:
                longest = len(group.prefix) + np.maximum(tails, tails[inside].max())
                cost = longest * (inside.sum() + 1)
            else:
                cost = len(group.prefix) + tails[inside].sum() + tails
            fits = ~inside & (gains > 0) & (cost <= packer.token_budget)
            if not fits.any():
                break
            inside[int(np.argmax(np.where(fits, gains / tails, 0)))] = True
        piece = [number for number, each in left.items() if inside[each.better] and inside[each.worse]]
        between[np.ix_(inside, inside)] = 0
        for number in piece:
            del left[number]
        pieces.append(tuple(piece))
    return pieces
