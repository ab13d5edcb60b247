"""Packing: which groups make a step, and which of them share a micro-batch.

In: token counts. Out: a plan of steps x ranks x micro-batches of group indices. A pure function of its
arguments: no tokens, no torch, no files, no clock.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from rm_gallery.data.mixture import Mixture
from rm_gallery.data.token_data import GroupSizes

# N groups; lengths count a shared prompt once


@dataclass(frozen=True)
class PackingConfig:
    """Part of `data`: batches and micro-batches."""

    __pydantic_config__ = {"extra": "forbid"}

    train_batch_size: int = 256
    """Comparisons (pairs) of one optimizer step, over all processes."""
    micro_batch_size_per_gpu: int = 1
    """Pairs of full length that one micro-batch has room for: its token budget is this x 2 x `max_length`."""
    max_tokens_per_micro_batch: int | None = None
    """The token budget itself; takes the place of `micro_batch_size_per_gpu`."""
    drop_last: bool = False
    """Leave out the last step of an epoch when it is not full."""
    shuffle: bool = True
    """A new order each epoch, from `trainer.seed` and the epoch; false keeps the order of the files."""

    def token_budget(self, max_length: int) -> int:
        """Most tokens of one micro-batch."""
        return self.max_tokens_per_micro_batch or self.micro_batch_size_per_gpu * 2 * max_length


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: `packs[rank]` is a list of micro-batches, each a list of group indices.

    All ranks have equally many, since a rank that stops early leaves the others waiting in a collective; a
    rank that runs short gets empty ones.
    """

    packs: list[list[list[int]]]
    num_comparisons: int
    """Comparisons of the step over all ranks: what the loss sum is divided by."""


def epoch_order(num_groups: int, *, seed: int, epoch: int, shuffle: bool, mixture: Mixture | None = None) -> np.ndarray:
    """[M] int64: the groups of this epoch in order; every group once, without a mixture."""
    groups = None if mixture is None else mixture.groups(seed=seed, epoch=epoch)
    count = num_groups if groups is None else len(groups)
    if not shuffle:
        return np.arange(count) if groups is None else groups
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return order if groups is None else groups[order]


class Steps(Sequence[np.ndarray]):
    """The steps of an epoch: `steps[i]` holds the group indices of step i, cut from the order when asked for."""

    def __init__(self, order: np.ndarray, bounds: np.ndarray) -> None:
        """bounds: [steps + 1] int64, where each step begins in the order, and where the last one ends."""
        self._order, self._bounds = order, bounds

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        place = index % len(self)
        return self._order[self._bounds[place] : self._bounds[place + 1]]


def split_steps(order: np.ndarray, num_comparisons: np.ndarray, *, batch_size: int, drop_last: bool) -> Steps:
    """Cut the order into steps of at most `batch_size` comparisons; a group with more has a step of its own.

    num_comparisons: [N] int, by group. `drop_last` leaves out a last step that is not full.
    """
    if not len(order):
        return Steps(order, np.zeros(1, np.int64))
    ends = np.cumsum(num_comparisons[order], dtype=np.int64)
    largest = int(num_comparisons.max())
    bounds, start, done = [0], 0, 0
    while start < len(order):
        start = max(start + 1, int(np.searchsorted(ends, done + batch_size, side="right")))
        done = int(ends[start - 1])
        bounds.append(start)
    if drop_last:
        # Full: no further group of the largest kind would have found room.
        in_last = done - (int(ends[bounds[-2] - 1]) if len(bounds) > 2 else 0)
        if in_last <= batch_size - max(1, largest):
            bounds.pop()
    return Steps(order, np.array(bounds))


def plan_step(
    groups: np.ndarray, sizes: GroupSizes, *, token_budget: int, world_size: int = 1, padded: bool = False
) -> StepPlan:
    """Give every group of a step a micro-batch so that none holds more than `token_budget` tokens.

    groups: indices of the step's groups, none larger than the budget.
    padded: for a model that pads. The budget counts padded tokens then, and texts of like length go together.
    """
    if padded:
        bins = _runs_of_like_length(groups, sizes, token_budget)
    else:
        bins = _balanced_bins(groups, sizes.tokens, token_budget, world_size)
    bins += [[] for _ in range(-len(bins) % world_size)]
    packs = [bins[rank::world_size] for rank in range(world_size)]
    return StepPlan(packs, int(sizes.num_comparisons[groups].sum()))


def _balanced_bins(groups: np.ndarray, lengths: np.ndarray, budget: int, world_size: int) -> list[list[int]]:
    """Longest first, each into the emptiest bin; more bins until all fit, a thirtieth at a time.

    With as many bins as groups every bin holds one, so this ends.
    """
    order = groups[np.argsort(-lengths[groups], kind="stable")]
    sizes = lengths[order].tolist()
    count = -(-sum(sizes) // budget)
    count = max(1, -(-count // world_size)) * world_size
    while True:
        heap = [(0, index) for index in range(count)]
        bins: list[list[int]] = [[] for _ in range(count)]
        for group, size in zip(order.tolist(), sizes, strict=True):
            used, index = heap[0]
            if used + size > budget and used:
                break
            heapq.heapreplace(heap, (used + size, index))
            bins[index].append(group)
        else:
            return bins
        count += world_size * max(1, count // (30 * world_size))


def _runs_of_like_length(groups: np.ndarray, sizes: GroupSizes, budget: int) -> list[list[int]]:
    """Runs of the groups sorted by their longest text, longest first; every text costs the run's longest."""
    bins: list[list[int]] = []
    room = 0
    for group in groups[np.argsort(-sizes.longest_text[groups], kind="stable")].tolist():
        if room < sizes.num_responses[group]:
            bins.append([])
            room = budget // int(sizes.longest_text[group])
        bins[-1].append(group)
        room -= int(sizes.num_responses[group])
    return bins


class Plan:
    """Every step of a run, worked out when it is asked for; resuming is an index into it."""

    def __init__(
        self,
        sizes: GroupSizes,
        config: PackingConfig,
        *,
        token_budget: int,
        seed: int,
        world_size: int = 1,
        padded: bool = False,
        mixture: Mixture | None = None,
    ) -> None:
        self.sizes, self.config, self.token_budget = sizes, config, token_budget
        self.seed, self.world_size, self.padded, self.mixture = seed, world_size, padded, mixture
        self._epoch: int | None = None
        self._steps = Steps(np.zeros(0, np.int64), np.zeros(1, np.int64))

    def epoch_steps(self, epoch: int) -> Steps:
        """Group indices of each step of an epoch."""
        if epoch != self._epoch:
            order = epoch_order(
                len(self.sizes), seed=self.seed, epoch=epoch, shuffle=self.config.shuffle, mixture=self.mixture
            )
            self._steps = split_steps(
                order,
                self.sizes.num_comparisons,
                batch_size=self.config.train_batch_size,
                drop_last=self.config.drop_last,
            )
            self._epoch = epoch
        return self._steps

    def num_steps(self, epochs: int) -> int:
        """Optimizer steps in so many epochs."""
        return sum(len(self.epoch_steps(epoch)) for epoch in range(epochs))

    def step(self, groups: np.ndarray) -> StepPlan:
        """The micro-batches of one step."""
        return plan_step(
            groups, self.sizes, token_budget=self.token_budget, world_size=self.world_size, padded=self.padded
        )

    def fingerprint(self) -> str:
        """Hash of what decides the plan; a run may only be continued under the same one."""
        digest = hashlib.sha256()
        for sizes in (self.sizes.tokens, self.sizes.num_comparisons):
            digest.update(np.ascontiguousarray(sizes).data)
        weights = None if self.mixture is None else list(self.mixture.weights)
        # Not the whole configuration: where files or caches lie decides nothing.
        config = (self.config.train_batch_size, self.config.drop_last, self.config.shuffle)
        digest.update(repr((config, self.token_budget, self.seed, self.padded, weights)).encode())
        return digest.hexdigest()[:16]


def check_budget(
    sizes: GroupSizes, where: Callable[[int], str], *, token_budget: int, key: str, padded: bool = False
) -> str | None:
    """A sentence naming the longest group when it does not fit the budget, else None."""
    cost = sizes.longest_text.astype(np.int64) * sizes.num_responses if padded else sizes.tokens
    if not len(cost) or int(cost.max()) <= token_budget:
        return None
    index = int(cost.argmax())
    return (
        f"{where(index)}: a group of {int(cost[index])} tokens does not fit into a micro-batch of {token_budget}; "
        f"set {key} to at least {int(cost[index])}, or lower data.max_length"
    )
