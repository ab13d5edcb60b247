"""Loading: the plan's steps as batches, in order, from any step on, prepared in the background."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rm_gallery.data.batch import PackedBatch, collate
from rm_gallery.data.packing import Plan, StepPlan
from rm_gallery.data.token_data import TokenData


@dataclass(frozen=True)
class StepBatches:
    """The micro-batches of one rank in one optimizer step."""

    batches: list[PackedBatch]
    num_comparisons: int
    """Over all ranks: what the loss sum is divided by."""
    num_tokens: int
    """On this rank, each shared prompt counted once."""
    epoch: float
    """Epochs of data seen once this step is done."""


def load_steps(data: TokenData, plan: Plan, *, rank: int = 0, start_step: int = 0) -> Iterator[StepBatches]:
    """Steps from `start_step` on, epoch after epoch without end; the next one is made while one is trained on."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as worker:
        pending = None
        for epoch, place, num_steps, step in _planned_steps(plan, start_step):
            following = worker.submit(_collate_step, data, step, rank, epoch + (place + 1) / num_steps)
            if pending is not None:
                yield pending.result()
            pending = following


def _planned_steps(plan: Plan, start_step: int) -> Iterator[tuple[int, int, int, StepPlan]]:
    epoch, first = 0, 0
    while True:
        steps = plan.epoch_steps(epoch)
        if not steps:
            return
        for place in range(max(0, start_step - first), len(steps)):
            yield epoch, place, len(steps), plan.step(steps[place])
        first += len(steps)
        epoch += 1


def _collate_step(data: TokenData, step: StepPlan, rank: int, epoch: float) -> StepBatches:
    batches = [collate([data[index] for index in pack]) for pack in step.packs[rank]]
    return StepBatches(batches, step.num_comparisons, sum(batch.num_tokens for batch in batches), epoch)
