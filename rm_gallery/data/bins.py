"""Bins: items into as few bins as hold them, or into so many of like cost. Whole numbers, stable sorts throughout."""

from __future__ import annotations

from bisect import bisect_left, insort
from heapq import heappop, heappush, heapreplace

import numpy as np

# N items

_MOST_PASSED = 64  # bins without room that are looked at for one item


def longest_first(costs: np.ndarray, tokens: np.ndarray, count: int, budget: int) -> np.ndarray | None:
    """[N] the bin of each item: dearest first, each into the cheapest bin that has room (Graham 1969, "LPT").

    None where an item finds no room among the cheapest ones.
    A bin's cost and number lie in one whole number, which is faster to compare than a pair.
    """
    order = np.argsort(-costs, kind="stable")
    shift = count.bit_length()
    number = (1 << shift) - 1
    heap = list(range(count))
    rooms = [budget] * count
    chosen = []
    passed: list[int] = []  # bins without room for an item, put back once it has found its place
    for cost, size in zip((costs[order] << shift).tolist(), tokens[order].tolist(), strict=True):
        while rooms[heap[0] & number] < size:
            passed.append(heappop(heap))
            if not heap or len(passed) > _MOST_PASSED:
                return None
        cheapest = heap[0]
        place = cheapest & number
        chosen.append(place)
        rooms[place] -= size
        heapreplace(heap, cheapest + cost)
        while passed:
            heappush(heap, passed.pop())
    places = np.empty(len(costs), np.int64)
    places[order] = chosen
    return places


def best_fit(tokens: np.ndarray, budget: int) -> np.ndarray:
    """[N] the bin of each item: largest first, each into the fullest bin that has room (best fit decreasing)."""
    order = np.argsort(-tokens, kind="stable")
    shift = len(tokens).bit_length()
    number = (1 << shift) - 1
    rooms: list[int] = []  # sorted: room that is left, and the bin's number
    chosen = []
    for size in (tokens[order] << shift).tolist():
        at = bisect_left(rooms, size)
        room = rooms.pop(at) if at < len(rooms) else (budget << shift) | len(rooms)
        chosen.append(room & number)
        insort(rooms, room - size)
    places = np.empty(len(tokens), np.int64)
    places[order] = chosen
    return places


def cut_runs(longest: np.ndarray, each: np.ndarray, ends: np.ndarray, budget: int, capacity: int) -> list[int]:
    """Where runs of sorted groups end, each with as many responses as fit into both limits and one group at least.

    longest, each: [N] tokens and cost of a text, falling. ends: [N] responses up to and with each group.
    """
    bounds, start, done = [], 0, 0
    while start < len(longest):
        room = min(budget // int(longest[start]), capacity // int(each[start]))
        start = max(start + 1, int(np.searchsorted(ends, done + room, side="right")))
        done = int(ends[start - 1])
        bounds.append(start)
    return bounds
