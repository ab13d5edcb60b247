"""Packing: which groups make a step, and which of them share a micro-batch.

In: token counts. Out: a plan of steps x ranks x micro-batches of group indices. A pure function of its
arguments: no tokens, no torch, no files, no clock.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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


def epoch_order(num_groups: int, *, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """[N] int64: the order of groups in this epoch."""
    if not shuffle:
        return np.arange(num_groups)
    return np.random.default_rng([seed, epoch]).permutation(num_groups)


def split_steps(
    order: np.ndarray, num_comparisons: np.ndarray, *, batch_size: int, drop_last: bool
) -> list[np.ndarray]:
    """Cut the order into steps of at most `batch_size` comparisons; a group with more has a step of its own.

    num_comparisons: [N] int64, by group. `drop_last` leaves out a last step that is not full.
    """
    if not len(order):
        return []
    counts = num_comparisons[order]
    if (counts == counts[0]).all():
        size = max(1, batch_size // max(1, int(counts[0])))
        steps = [order[start : start + size] for start in range(0, len(order), size)]
        batch_size = min(batch_size, size * int(counts[0]))  # all that a full step can hold
    else:
        steps, start, total = [], 0, 0
        for index, count in enumerate(counts.tolist()):
            if total and total + count > batch_size:
                steps.append(order[start:index])
                start, total = index, 0
            total += count
        steps.append(order[start:])
    if drop_last and int(num_comparisons[steps[-1]].sum()) < batch_size:
        steps.pop()
    return steps


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
    ) -> None:
        self.sizes, self.config, self.token_budget = sizes, config, token_budget
        self.seed, self.world_size, self.padded = seed, world_size, padded
        self._epoch: int | None = None
        self._steps: list[np.ndarray] = []

    def epoch_steps(self, epoch: int) -> list[np.ndarray]:
        """Group indices of each step of an epoch."""
        if epoch != self._epoch:
            order = epoch_order(len(self.sizes), seed=self.seed, epoch=epoch, shuffle=self.config.shuffle)
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
        digest = hashlib.sha256(self.sizes.tokens.tobytes() + self.sizes.num_comparisons.tobytes())
        digest.update(repr((self.config, self.token_budget, self.seed, self.padded)).encode())
        return digest.hexdigest()[:16]


def check_budget(
    sizes: GroupSizes, where: Sequence[str], *, token_budget: int, key: str, padded: bool = False
) -> str | None:
    """A sentence naming the longest group when it does not fit the budget, else None."""
    cost = sizes.longest_text * sizes.num_responses if padded else sizes.tokens
    if not len(cost) or int(cost.max()) <= token_budget:
        return None
    index = int(cost.argmax())
    return (
        f"{where[index]}: a group of {int(cost[index])} tokens does not fit into a micro-batch of {token_budget}; "
        f"set {key} to at least {int(cost[index])}, or lower data.max_length"
    )
