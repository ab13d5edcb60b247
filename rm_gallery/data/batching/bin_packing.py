"""Bin packing: the groups of one step into as few micro-batches as hold them, equally many on all ranks, of like cost.

In: token counts. Out: indices by rank and micro-batch. A pure function of its arguments, in whole numbers and stable
sorts throughout, so that every machine of a run works out the same.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from itertools import chain
from typing import TypeAlias, TypeVar

import numpy as np

from rm_gallery.data.token_cache.arrays import GroupSizes

# N groups of one step, or items; W ranks

Whole = TypeVar("Whole", int, np.ndarray)

Packs: TypeAlias = list[list[list[int]]]
"""`packs[rank][micro-batch]` holds indices of groups; all ranks have equally many micro-batches."""

_UNEVEN = 0.03  # of the mean, that the slowest rank may have more
_GROUPS_TO_BALANCE = 16  # a rank: with fewer, one more micro-batch would often not help
_LAYER_MATRICES = 12  # weights of a layer's matrices over its width squared (Kaplan et al. 2020, table 1)


def attention_length(hidden_size: int) -> int:
    """Tokens of a text at which attention costs as much as the matrices of a layer.

    Of a layer's forward pass a token takes 2 x 12 x width^2 operations in matrices (Kaplan et al. 2020, "Scaling Laws
    for Neural Language Models", table 1) and 4 x width for each key that it sees, half its text's on average.
    """
    return _LAYER_MATRICES * hidden_size


@dataclass(frozen=True)
class Packer:
    """How groups are packed, and the estimate of cost that they are balanced by."""

    token_budget: int
    """Most tokens of a micro-batch; a group with more has one of its own."""
    world_size: int = 1
    padded: bool = False
    """For a model that pads: the budget counts padded tokens then, and texts of like length go together."""
    attention_length: int = attention_length(4096)
    """See `attention_length`; any value keeps to the budget, a wrong one balances less well."""

    def tokens(self, sizes: GroupSizes) -> np.ndarray:
        """[N] int64: tokens that the model computes for each group; for a model that pads, if it were alone."""
        return self.count_tokens(
            sizes.tokens.astype(np.int64), sizes.longest_text.astype(np.int64), sizes.num_responses.astype(np.int64)
        )

    def count_tokens(self, tokens: Whole, longest_text: Whole, num_responses: Whole) -> Whole:
        """Tokens that the model computes: with padding, every response is as long as the longest text."""
        return longest_text * num_responses if self.padded else tokens

    def costs(self, sizes: GroupSizes) -> np.ndarray:
        """[N] int64: time that each group takes, in that of a token without attention.

        A token sees half its text on average, so attention adds its text's length over `attention_length` to the 1
        of the matrices. Every text is taken for as long as the group's longest.
        """
        return self.cost(self.tokens(sizes), sizes.longest_text)

    def cost(self, tokens: Whole, longest_text: Whole) -> Whole:
        """The cost of so many tokens in texts of this length; see `costs`."""
        return tokens + tokens * longest_text // self.attention_length

    def pack(self, sizes: GroupSizes) -> Packs:
        """Give every group a micro-batch so that none holds more than the budget, unless it is one group."""
        if not len(sizes):
            return [[] for _ in range(self.world_size)]
        if self.padded:
            bins = self._runs(sizes)
            return self._deal(bins, self.pack_costs(bins, sizes))
        costs = self.costs(sizes)
        places, count = self._places(np.minimum(self.tokens(sizes), self.token_budget), costs)
        order = np.argsort(places, kind="stable").tolist()
        ends = np.cumsum(np.bincount(places, minlength=count)).tolist()
        bins = [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        return self._deal(bins, _sums(places, costs, count))

    def pack_by_length(self, sizes: GroupSizes) -> list[list[int]]:
        """Micro-batches of one rank for inference: groups sorted by their longest text, each filled in turn.

        Nothing has to be balanced, so groups of similar length go together: less padding, and attention over
        segments of similar length. Next-fit decreasing: a group that exceeds the budget starts the next micro-batch.

        Example, budget 100, groups of 30, 60, 20, 50 and 40 tokens with one response each:
        [60], [50 40], [30 20]. With padding 50 and 40 cost 2 x 50 = 100 tokens.
        """
        order = np.argsort(-sizes.longest_text.astype(np.int64), kind="stable")
        ones = np.ones(len(order), np.int64)
        tokens = sizes.longest_text[order].astype(np.int64) if self.padded else ones  # of each item
        items = sizes.num_responses if self.padded else sizes.tokens
        ends = np.cumsum(items[order], dtype=np.int64)
        bounds = cut_runs(tokens, tokens, ends, self.token_budget, self.token_budget)
        return [part.tolist() for part in np.split(order, bounds[:-1])] if bounds else []

    def _places(self, tokens: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, int]:
        """The micro-batch of each group, and how many there are over all ranks.

        As few as could be, balanced by cost; where those overflow, balanced by tokens, or packed as tightly as can be,
        which says how many it takes, too. Where all of these leave the ranks uneven, one more for each rank has room.
        """
        least = max(-(-int(tokens.sum()) // self.token_budget), int((2 * tokens > self.token_budget).sum()))
        count = self._rounded(least)
        tight: np.ndarray | None = None
        fewest: tuple[np.ndarray, int] | None = None
        while True:
            for by in (costs, tokens):
                places = longest_first(by, tokens, count, self.token_budget)
                if places is not None and self._is_even(places, costs, count):
                    return places, count
                if places is not None:
                    fewest = fewest or (places, count)
            tight = best_fit(tokens, self.token_budget) if tight is None else tight
            needed = self._rounded(int(tight.max()) + 1)
            if needed <= count:
                if self._is_even(tight, costs, count):
                    return tight, count
                fewest = fewest or (tight, count)
            if fewest is not None and count > fewest[1]:
                return fewest
            count = needed if fewest is None else count + self.world_size

    def _is_even(self, places: np.ndarray, costs: np.ndarray, count: int) -> bool:
        """Whether the slowest rank has little more than the mean, or there are too few groups to ask that."""
        if len(places) < _GROUPS_TO_BALANCE * self.world_size:
            return True
        bins = _sums(places, costs, count)
        loads = np.bincount(self._ranks(bins), bins)
        return bool(loads.max() <= (1 + _UNEVEN) * loads.mean())

    def _rounded(self, count: int) -> int:
        return max(1, -(-count // self.world_size)) * self.world_size

    def _runs(self, sizes: GroupSizes) -> list[list[int]]:
        """Runs of the groups sorted by their longest text; a text costs what the run's longest does.

        As few as the budget allows, and among these the ones whose dearest is cheapest, found by bisection.
        """
        order = np.argsort(-sizes.longest_text.astype(np.int64), kind="stable")
        longest = sizes.longest_text[order].astype(np.int64)
        each = self.cost(longest, longest)
        ends = np.cumsum(sizes.num_responses[order], dtype=np.int64)
        widest = int(each.max()) * int(ends[-1])
        count = self._rounded(len(cut_runs(longest, each, ends, self.token_budget, widest)))
        low, high = 0, widest  # `high` needs no more than `count` runs
        while low + 1 < high:
            middle = (low + high) // 2
            fits = len(cut_runs(longest, each, ends, self.token_budget, middle)) <= count
            low, high = (low, middle) if fits else (middle, high)
        bounds = cut_runs(longest, each, ends, self.token_budget, high)
        runs = [part.tolist() for part in np.split(order, bounds[:-1])]
        return runs + [[] for _ in range(count - len(runs))]

    def _deal(self, bins: Sequence[list[int]], costs: np.ndarray) -> Packs:
        """Bins of these costs to the ranks; micro-batches that ranks compute at the same time cost alike."""
        packs: Packs = [[] for _ in range(self.world_size)]
        ranks = self._ranks(costs).tolist()
        for place in np.argsort(-costs, kind="stable").tolist():
            packs[ranks[place]].append(bins[place])
        return packs

    def _ranks(self, costs: np.ndarray) -> np.ndarray:
        """[bins] the rank of each bin, equally many for each.

        Dearest first, a round of `world_size` at a time, in each the dearest to the rank with least so far.
        """
        order = np.argsort(-costs, kind="stable")
        ranks = np.empty(len(costs), np.int64)
        loads = np.zeros(self.world_size, np.int64)
        for start in range(0, len(costs), self.world_size):
            members = order[start : start + self.world_size]
            ranks[members] = np.argsort(loads, kind="stable")
            loads[ranks[members]] += costs[members]
        return ranks

    def pack_tokens(self, packs: Sequence[Sequence[int]], sizes: GroupSizes) -> np.ndarray:
        """[packs] int64: tokens that the model computes for each micro-batch."""
        place, index = _flat(packs)
        if not self.padded:
            return _sums(place, sizes.tokens[index], len(packs))
        return _sums(place, sizes.num_responses[index], len(packs)) * self._longest(packs, sizes)

    def pack_costs(self, packs: Sequence[Sequence[int]], sizes: GroupSizes) -> np.ndarray:
        """[packs] int64: estimated cost of each micro-batch, as of `costs`."""
        if self.padded:
            return self.cost(self.pack_tokens(packs, sizes), self._longest(packs, sizes))
        place, index = _flat(packs)
        return _sums(place, self.costs(sizes)[index], len(packs))

    def _longest(self, packs: Sequence[Sequence[int]], sizes: GroupSizes) -> np.ndarray:
        place, index = _flat(packs)
        longest = np.zeros(len(packs), np.int64)
        np.maximum.at(longest, place, sizes.longest_text[index])
        return longest

    def step_cost(self, packs: Packs, sizes: GroupSizes) -> int:
        """Estimated time of a step in which the ranks wait for each other after every micro-batch, as of `costs`."""
        at_once = list(chain.from_iterable(zip(*packs, strict=True)))
        return int(self.pack_costs(at_once, sizes).reshape(-1, self.world_size).max(axis=1).sum())


def _flat(packs: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """The micro-batch and the index of each group."""
    place = np.repeat(np.arange(len(packs)), [len(pack) for pack in packs])
    return place, np.fromiter(chain.from_iterable(packs), np.int64, len(place))


def _sums(place: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """[count] int64: sums of the values by place; exact, since float64 holds these whole numbers."""
    return np.bincount(place, values, minlength=count).astype(np.int64)


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


def cut_runs(tokens: np.ndarray, costs: np.ndarray, ends: np.ndarray, budget: int, capacity: int) -> list[int]:
    """Ends of runs of sorted groups. A run has as many items as fit both limits, and at least one group.

    tokens, costs: [N] of one item of each group, descending; all items of a run count as much as those of its first
    group. ends: [N] items up to and including each group. An item is a padded response, or a token without padding.

    Example, budget 20 and no limit by cost, groups of 2, 1, 1 and 3 responses of 8, 6, 5 and 4 tokens: the first run
    has room for 20 // 8 = 2 responses, the second for 20 // 6 = 3, the third for 20 // 4 = 5: ends 1, 3, 4.
    """
    bounds, start, done = [], 0, 0
    while start < len(tokens):
        room = min(budget // int(tokens[start]), capacity // int(costs[start]))
        start = max(start + 1, int(np.searchsorted(ends, done + room, side="right")))
        done = int(ends[start - 1])
        bounds.append(start)
    return bounds
