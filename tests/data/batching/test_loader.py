"""Loading: the plan's steps as batches, endless, the same from any start."""

from __future__ import annotations

import threading
from itertools import islice

import pytest

from rm_gallery.data.batching.bin_packing import Packer
from rm_gallery.data.batching.loader import StepBatches, load_steps
from rm_gallery.data.batching.plan import PackingConfig, Plan
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.tokenization.token_group import Origin
from tests.small import random_groups

GROUPS = [group for seed in range(3) for group in random_groups(seed)]
DATA = TokenData.from_groups((group, Origin()) for group in GROUPS)


def plan(*, world_size: int = 1, **options: bool) -> Plan:
    config = PackingConfig(train_batch_size=7, **options)
    return Plan(DATA.sizes, config, Packer(400, world_size), seed=3)


def tokens(steps: list[StepBatches]) -> list[list[list[int]]]:
    return [[batch.input_ids.tolist() for batch in step.batches] for step in steps]


@pytest.mark.parametrize("start", [0, 1, 4, 11])
def test_starting_at_a_step_gives_the_tail_of_the_stream(start: int) -> None:
    whole = list(islice(load_steps(DATA, plan()), 15))
    tail = list(islice(load_steps(DATA, plan(), start_step=start), 15 - start))
    assert tokens(tail) == tokens(whole[start:])
    assert [step.epoch for step in tail] == [step.epoch for step in whole[start:]]


def test_each_epoch_holds_every_token_once_in_another_order() -> None:
    first = plan().num_steps(1)
    steps = list(islice(load_steps(DATA, plan()), plan().num_steps(2)))
    epochs = [tokens(steps[:first]), tokens(steps[first:])]
    assert epochs[0] != epochs[1]
    for epoch in epochs:
        assert sorted(token for step in epoch for batch in step for token in batch) == sorted(DATA.tokens.tolist())
    assert steps[first - 1].epoch == 1.0
    assert steps[-1].epoch == 2.0


def test_the_ranks_together_hold_what_one_holds_alone() -> None:
    alone = next(load_steps(DATA, plan()))
    ranks = [next(load_steps(DATA, plan(world_size=2), rank=rank)) for rank in range(2)]
    assert sum(rank.num_tokens for rank in ranks) == alone.num_tokens
    assert {rank.num_comparisons for rank in ranks} == {alone.num_comparisons}
    assert len({len(rank.batches) for rank in ranks}) == 1


def test_a_plan_without_steps_ends() -> None:
    config = PackingConfig(train_batch_size=10_000, drop_last=True)
    assert list(load_steps(DATA, Plan(DATA.sizes, config, Packer(400), seed=0))) == []


def test_closing_the_stream_ends_its_thread() -> None:
    steps = load_steps(DATA, plan())
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
