"""Data loading: the steps of the plan as batches, in order, from any step, prefetched in a background thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from rm_gallery.data.batching.packed_batch import PackedBatch, collate
from rm_gallery.data.batching.plan import Plan
from rm_gallery.data.token_cache.arrays import TokenData


@dataclass(frozen=True)
class StepBatches:
    """The micro-batches of one rank in one optimizer step."""

    batches: list[PackedBatch]
    num_comparisons: int
    """See `StepPlan.num_comparisons`."""
    num_tokens: int
    """Tokens that this rank computes: shared prompts and shared responses counted once."""
    epoch: float
    """Epochs of data seen after this step."""
    num_pairs: int | None = None
    """Comparisons, rated responses or conversations over all ranks; None if they are `num_comparisons`."""
    num_targets: int = 0
    """Target tokens of the language-model loss, over all ranks."""
    phase: int = 0
    """Which phase of the run the step belongs to."""
    ends_phase: bool = False
    """Whether it is the last of its phase."""


@dataclass(frozen=True)
class Phase:
    """Consecutive steps of a run, on a plan of their own."""

    data: TokenData
    plan: Plan
    num_steps: int


def load_phases(phases: Sequence[Phase], *, rank: int = 0, start_step: int = 0) -> Iterator[StepBatches]:
    """The steps of all phases in order, from `start_step` of the run on."""
    epochs = 0.0
    for number, phase in enumerate(phases):
        if start_step < phase.num_steps:
            steps = load_steps(phase.data, phase.plan, rank=rank, start_step=start_step)
            for place, step in zip(range(start_step + 1, phase.num_steps + 1), steps, strict=False):
                ends = place == phase.num_steps
                yield replace(step, epoch=epochs + step.epoch, phase=number, ends_phase=ends)
        epochs += phase.plan.epochs(phase.num_steps)
        start_step = max(0, start_step - phase.num_steps)


def load_steps(data: TokenData, plan: Plan, *, rank: int = 0, start_step: int = 0) -> Iterator[StepBatches]:
    """Steps from `start_step` on, epoch after epoch without end; the next step is prefetched during the current one."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as worker:
        pending = None
        for groups, epoch in _steps(plan, start_step):
            following = worker.submit(_load_step, data, plan, groups, rank, epoch)
            if pending is not None:
                yield pending.result()
            pending = following


def _steps(plan: Plan, start_step: int) -> Iterator[tuple[np.ndarray, float]]:
    """The groups of each step, and the epochs of data seen after it."""
    epoch, first = 0, 0
    while True:
        steps = plan.epoch_steps(epoch)
        if not steps:
            return
        for place in range(max(0, start_step - first), len(steps)):
            yield steps[place], epoch + (place + 1) / len(steps)
        first += len(steps)
        epoch += 1


def _load_step(data: TokenData, plan: Plan, groups: np.ndarray, rank: int, epoch: float) -> StepBatches:
    step = plan.step(data, groups)
    batches = [collate(step.load(data, pack)) for pack in step.packs[rank]]
    tokens, pairs = sum(batch.num_tokens for batch in batches), int(data.sizes.num_comparisons[groups].sum())
    return StepBatches(batches, step.num_comparisons, tokens, epoch, pairs, step.num_targets)
