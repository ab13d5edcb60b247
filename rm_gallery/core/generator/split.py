"""Splitting: units of several sizes onto sides, as near to the wanted shares as whole units allow."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

_ENOUGH = 1e-9
_FEW = 4096  # ways to deal out the units that are all tried


def split_units(sizes: Sequence[int], shares: Sequence[float]) -> list[int]:
    """The side of each unit, as an index into `shares`.

    sizes: rows of each unit, in an order that stands for chance. shares: of all rows, adding up to 1.
    Large units are dealt out first, each to the side that has the smallest part of its share yet, so that every side
    gets its share of the large and of the small; then single units move, or change places, while that brings the
    sides nearer to their shares.
    """
    targets = [share * sum(sizes) for share in shares]
    if len(shares) ** min(len(sizes), 16) <= _FEW:
        ways = product(range(len(shares)), repeat=len(sizes))
        return list(min(ways, key=lambda way: round(_distance(sizes, list(way), targets), 6)))
    filled = [0] * len(shares)
    sides = [0] * len(sizes)
    for unit in sorted(range(len(sizes)), key=lambda unit: -sizes[unit]):
        fitting = [side for side, target in enumerate(targets) if filled[side] + sizes[unit] <= target + _ENOUGH]
        if fitting:
            side = min(fitting, key=lambda side: filled[side] / targets[side])
        else:
            side = max(range(len(shares)), key=lambda side: targets[side] - filled[side])
        sides[unit] = side
        filled[side] += sizes[unit]
    _improve(sizes, sides, targets, filled)
    return sides


def _distance(sizes: Sequence[int], sides: Sequence[int], targets: Sequence[float]) -> float:
    """Rows that lie on another side than the shares want, counted on both."""
    left = list(targets)
    for size, side in zip(sizes, sides, strict=True):
        left[side] -= size
    return sum(map(abs, left))


def _improve(sizes: Sequence[int], sides: list[int], targets: Sequence[float], filled: list[int]) -> None:
    """Move units between sides, in place, one for at most one other at a time, for as long as that helps."""
    by_size: list[dict[int, list[int]]] = [{} for _ in targets]
    for unit, side in enumerate(sides):
        by_size[side].setdefault(sizes[unit], []).append(unit)
    while move := _best_move(by_size, targets, filled):
        giver, taker, given, taken = move
        for size, before, after in ((given, giver, taker), (taken, taker, giver)):
            if size:
                unit = by_size[before][size].pop()
                if not by_size[before][size]:
                    del by_size[before][size]
                by_size[after].setdefault(size, []).append(unit)
                sides[unit] = after
                filled[before] -= size
                filled[after] += size


def _best_move(
    by_size: Sequence[dict[int, list[int]]], targets: Sequence[float], filled: Sequence[int]
) -> tuple[int, int, int, int] | None:
    """(giving side, taking side, size given, size taken back or 0) that helps most; None when nothing helps."""
    best, found = _ENOUGH, None
    for giver in range(len(targets)):
        for taker in range(len(targets)):
            excess, lack = filled[giver] - targets[giver], targets[taker] - filled[taker]
            if giver == taker or excess + lack <= _ENOUGH:
                continue
            for given in by_size[giver]:
                for taken in (0, *by_size[taker]):
                    moved = given - taken
                    gain = abs(excess) + abs(lack) - abs(excess - moved) - abs(lack - moved)
                    if gain > best:
                        best, found = gain, (giver, taker, given, taken)
    return found
