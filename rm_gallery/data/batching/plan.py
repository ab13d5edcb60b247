"""The plan of a run: which groups each step of each epoch uses.

In: numbers of comparisons. Out: the groups of each step. A pure function of its arguments: no torch, no files, no
clock; resuming at step k is an index into the plan. `prompt_sharing.py` merges or splits the groups of a step, and
`bin_packing.py` packs them into micro-batches of the ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from rm_gallery.data.batching.bin_packing import Packer
from rm_gallery.data.batching.prompt_sharing import StepPlan, plan_step
from rm_gallery.data.token_cache.arrays import GroupSizes, TokenData

# N groups of a dataset, of all its sources; M groups of an epoch, repetitions included

_MAX_RUN = 16  # consecutive groups of a prompt


@dataclass(frozen=True)
class PackingConfig:
    """Part of `data`: batches and micro-batches."""

    __pydantic_config__ = {"extra": "forbid"}

    train_batch_size: int = 256
    """Global batch size: comparisons (pairs) per optimizer step, over all ranks."""
    micro_batch_size_per_gpu: int = 1
    """Pairs of maximum length that fit one micro-batch: its token budget is this x 2 x `max_length`."""
    max_tokens_per_micro_batch: int | None = None
    """The token budget itself; overrides `micro_batch_size_per_gpu`."""
    drop_last: bool = False
    """Drop the last step of an epoch if it is not full."""
    shuffle: bool = True
    """A new order each epoch, from `trainer.seed` and the epoch; false keeps the order of the files."""
    keep_prompts_together: bool = False
    """Shuffle prompts instead of pairs, so that pairs of a prompt are in the same step and can share it."""
    share_prompts: bool = True
    """Compute pairs of the same prompt in a step together, with the prompt and each distinct response once."""

    def token_budget(self, max_length: int) -> int:
        """Maximum tokens of one micro-batch."""
        return self.max_tokens_per_micro_batch or self.micro_batch_size_per_gpu * 2 * max_length


def epoch_order(
    num_groups: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool,
    mixture: Mixture | None = None,
    prompts: np.ndarray | None = None,
) -> np.ndarray:
    """[M] int64: the groups of this epoch in order; without a mixture, every group once.

    prompts: [N] prompt of each group, to shuffle prompts instead of groups.
    """
    groups = np.arange(num_groups) if mixture is None else mixture.groups(seed=seed, epoch=epoch)
    if not shuffle:
        return groups
    draw = np.random.default_rng([seed, epoch])
    order = groups[draw.permutation(len(groups))]
    return order if prompts is None else _prompts_together(order, prompts[order], draw)


def _prompts_together(order: np.ndarray, prompts: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """The same groups with those of a prompt in runs of at most `_MAX_RUN`, in shuffled order.

    Runs are short, so that even data of a single prompt are shuffled. Example with runs of 2: groups 0 1 2 3 4 of
    prompts A B A A B make the runs [0 2], [3] and [1 4], which are then shuffled.
    """
    by_prompt = np.argsort(prompts, kind="stable")
    found = prompts[by_prompt]
    first = np.flatnonzero(np.concatenate([[True], found[1:] != found[:-1]])[: len(found)])
    place = np.arange(len(found)) - np.repeat(first, np.diff(np.append(first, len(found))))
    run = np.cumsum(place % _MAX_RUN == 0) - 1
    keys = draw.permutation(int(run[-1]) + 1 if len(run) else 0)
    return order[by_prompt[np.argsort(keys[run], kind="stable")]]


class Steps(Sequence[np.ndarray]):
    """The steps of an epoch: `steps[i]` is a view of the group indices of step i."""

    def __init__(self, order: np.ndarray, bounds: np.ndarray) -> None:
        """bounds: [steps + 1] int64, the start of each step in the order, and the end of the last."""
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
    """Split the order into steps of at most `batch_size` comparisons; a group with more is a step alone.

    num_comparisons: [N] int, by group. drop_last: drop a last step that is not full.

    Example, batch_size 2 and groups with 1, 1, 3 and 1 comparisons: steps [0 1], [2] and [3].
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
        # The last step is full if the largest group would not have fit as well.
        in_last = done - (int(ends[bounds[-2] - 1]) if len(bounds) > 2 else 0)
        if in_last <= batch_size - max(1, largest):
            bounds.pop()
    return Steps(order, np.array(bounds))


class Plan:
    """Every step of a run, computed lazily."""

    def __init__(
        self,
        sizes: GroupSizes,
        config: PackingConfig,
        packer: Packer,
        *,
        seed: int,
        mixture: Mixture | None = None,
        prompts: np.ndarray | None = None,
    ) -> None:
        """prompts: [N] prompt of each group, for `keep_prompts_together`."""
        self.sizes, self.config, self.packer, self.seed, self.mixture = sizes, config, packer, seed, mixture
        self.prompts = prompts if config.keep_prompts_together else None
        self._used: np.ndarray | None = None  # [N] bool; None for all
        self._epoch: int | None = None
        self._steps = Steps(np.zeros(0, np.int64), np.zeros(1, np.int64))

    def epoch_steps(self, epoch: int) -> Steps:
        """Group indices of each step of an epoch."""
        if epoch != self._epoch:
            order = epoch_order(
                len(self.sizes), seed=self.seed, epoch=epoch, shuffle=self.config.shuffle, mixture=self.mixture,
                prompts=self.prompts,
            )  # fmt: skip
            self._steps = split_steps(
                order if self._used is None else order[self._used[order]],
                self.sizes.num_comparisons,
                batch_size=self.config.train_batch_size,
                drop_last=self.config.drop_last,
            )
            self._epoch = epoch
        return self._steps

    def of(self, sizes: GroupSizes) -> Plan:
        """The plan of the same groups with other sizes, without those that have no comparison then."""
        found = Plan(sizes, self.config, self.packer, seed=self.seed, mixture=self.mixture, prompts=self.prompts)
        found._used = sizes.num_comparisons > 0
        return found

    def num_steps(self, epochs: int) -> int:
        """Number of optimizer steps in this number of epochs."""
        return sum(len(self.epoch_steps(epoch)) for epoch in range(epochs))

    def epochs(self, num_steps: int) -> float:
        """Epochs of data that this number of steps uses, from the first on."""
        epoch = 0
        while num_steps > (size := len(self.epoch_steps(epoch))):
            epoch, num_steps = epoch + 1, num_steps - size
        return epoch + num_steps / size

    def step(self, data: TokenData, groups: np.ndarray) -> StepPlan:
        """The micro-batches of one step."""
        return plan_step(data, groups, self.packer, share_prompts=self.config.share_prompts)

    def fingerprint(self) -> str:
        """Hash of everything that determines the plan; a run resumes only with the same hash."""
        digest = hashlib.sha256()
        for array in (self.sizes.tokens, self.sizes.num_comparisons, self.prompts):
            if array is not None:
                digest.update(np.ascontiguousarray(array).data)
        weights = None if self.mixture is None else list(self.mixture.weights)
        # Not the whole configuration: paths of files and caches do not matter.
        config = (
            self.config.train_batch_size,
            self.config.drop_last,
            self.config.shuffle,
            self.config.share_prompts,
            self.prompts is not None,
        )
        packer = (self.packer.token_budget, self.packer.padded, self.packer.attention_length)
        digest.update(repr((config, packer, self.seed, weights)).encode())
        return digest.hexdigest()[:16]


def long_pairs(data: TokenData, packer: Packer, *, key: str) -> str | None:
    """A warning about pairs above the token budget, or None.

    key: the setting of the token budget.
    """
    groups = np.flatnonzero(packer.tokens(data.sizes) > packer.token_budget)
    owner, prefix, better, worse = data.pair_lengths(groups)
    cost = 2 * (prefix + np.maximum(better, worse)) if packer.padded else prefix + better + worse
    too_long = int((cost > packer.token_budget).sum())
    if not too_long:
        return None
    longest = int(cost.argmax())
    return (
        f"{too_long} pairs exceed the token budget of a micro-batch ({packer.token_budget}), and each gets a "
        f"micro-batch alone; the longest, {data.where(int(owner[longest]))}, has {int(cost[longest])} tokens. If "
        f"memory runs out, lower data.max_length; to fit all pairs, set {key} to at least {int(cost[longest])}"
    )


@dataclass(frozen=True)
class Mixture:
    """How often the groups of each entry of `data.train_files` are used per epoch.

    Example, weight 2.5 and groups a b c d: each epoch uses all of them twice, and two of the seeded order b d a c: b d
    in epoch 0, a c in epoch 1, b d again in epoch 2.
    """

    entry: np.ndarray
    """[N] int: the entry of each group."""
    weights: Sequence[float]
    """By entry: 2 uses each of its groups twice; 0.5 uses half of them, and the other half in the next epoch."""

    def groups(self, *, seed: int, epoch: int) -> np.ndarray:
        """[M] int64: the groups of an epoch in the order of the files; repetitions follow as whole passes."""
        parts = []
        for entry, weight in enumerate(self.weights):
            members = np.flatnonzero(self.entry == entry)
            whole, rest = int(weight), weight - int(weight)
            parts += [members] * whole
            count = round(rest * len(members))
            if count:
                order = np.random.default_rng([seed, entry]).permutation(members)
                window = (epoch * count + np.arange(count)) % len(members)  # the next `count` of the order, cyclically
                parts.append(np.sort(order[window]))
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)
