"""Packing: plans that use every group once, keep to the token budget, and give all ranks equally much to do."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest

from rm_gallery.data.mixture import Mixture
from rm_gallery.data.packing import PackingConfig, Plan, StepPlan, check_budget, epoch_order, plan_step, split_steps
from rm_gallery.data.token_data import GroupSizes


def random_sizes(seed: int, num_groups: int, *, responses: tuple[int, int] = (2, 2)) -> GroupSizes:
    """Groups of K responses with K - 1 comparisons, texts of 1 to 100 tokens."""
    draw = np.random.default_rng(seed)
    counts = draw.integers(responses[0], responses[1] + 1, num_groups)
    longest = draw.integers(1, 101, num_groups)
    tokens = np.array([draw.integers(size, size * count + 1) for size, count in zip(longest, counts, strict=True)])
    return GroupSizes(tokens.astype(np.int64), longest, counts, counts - 1)


def cost(pack: list[int], sizes: GroupSizes, padded: bool) -> int:
    if padded:
        return int(sizes.longest_text[pack].max() * sizes.num_responses[pack].sum()) if pack else 0
    return int(sizes.tokens[pack].sum())


def packs_of(step: StepPlan) -> list[list[int]]:
    return [pack for rank in step.packs for pack in rank]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_step_holds_each_group_once_within_the_budget_and_equally_many_packs_per_rank(
    world_size: int, padded: bool
) -> None:
    for seed in range(60):
        sizes = random_sizes(seed, 1 + seed, responses=(1, 5))
        budget = int((sizes.longest_text * sizes.num_responses).max()) + seed % 300
        groups = np.random.default_rng(seed).permutation(len(sizes))[: 1 + seed // 2]
        step = plan_step(groups, sizes, token_budget=budget, world_size=world_size, padded=padded)
        assert sorted(group for pack in packs_of(step) for group in pack) == sorted(groups.tolist())
        assert len(step.packs) == world_size
        assert len({len(rank) for rank in step.packs}) == 1
        assert max(cost(pack, sizes, padded) for pack in packs_of(step)) <= budget
        assert step.num_comparisons == sizes.num_comparisons[groups].sum()


def test_a_pack_may_be_full_to_the_last_token_and_no_fuller() -> None:
    for lengths, budget, num_packs in (([6, 4], 10, 1), ([6, 6, 5], 11, 2), ([6, 6, 5], 10, 3)):
        tokens = np.array(lengths)
        sizes = GroupSizes(tokens, tokens, np.full(len(tokens), 2), np.ones(len(tokens), np.int64))
        assert len(packs_of(plan_step(np.arange(len(tokens)), sizes, token_budget=budget))) == num_packs


def test_no_pack_is_empty_when_there_are_groups_enough() -> None:
    sizes = random_sizes(0, 64)
    step = plan_step(np.arange(64), sizes, token_budget=400, world_size=4)
    assert all(packs_of(step))


def test_more_ranks_than_groups_leaves_empty_packs() -> None:
    step = plan_step(np.arange(2), random_sizes(0, 2), token_budget=1000, world_size=3)
    assert sorted(map(len, packs_of(step))) == [0, 1, 1]


def test_packs_are_balanced() -> None:
    sizes = random_sizes(0, 256)
    step = plan_step(np.arange(256), sizes, token_budget=2000)
    loads = [cost(pack, sizes, False) for pack in packs_of(step)]
    assert len(loads) <= 1.1 * sum(loads) / 2000 + 1
    assert max(loads) - min(loads) <= 100


def test_groups_just_above_half_the_budget_are_planned_without_long_search() -> None:
    draw = np.random.default_rng(0)
    lengths = draw.integers(4097, 4600, 4096)
    sizes = GroupSizes(lengths, lengths // 2, np.full(4096, 2), np.ones(4096, np.int64))
    start = time.process_time()
    step = plan_step(np.arange(4096), sizes, token_budget=8192)
    assert time.process_time() - start < 2.0  # adding one pack at a time takes about 10 s
    assert len([pack for pack in packs_of(step) if pack]) == 4096


def test_steps_hold_batch_size_pairs_and_the_rest_is_a_last_step() -> None:
    steps = split_steps(np.arange(10), np.ones(10, np.int64), batch_size=4, drop_last=False)
    assert [step.tolist() for step in steps] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_drop_last_leaves_out_only_a_step_that_is_not_full() -> None:
    ones = np.ones(10, np.int64)
    assert [len(s) for s in split_steps(np.arange(10), ones, batch_size=4, drop_last=True)] == [4, 4]
    assert [len(s) for s in split_steps(np.arange(8), ones, batch_size=4, drop_last=True)] == [4, 4]
    assert split_steps(np.arange(3), ones, batch_size=4, drop_last=True)[:] == []


def test_drop_last_keeps_full_steps_of_groups_that_do_not_divide_the_batch() -> None:
    threes = np.full(6, 3, np.int64)  # two groups of three comparisons fit into 8
    steps = split_steps(np.arange(6), threes, batch_size=8, drop_last=True)
    assert [step.tolist() for step in steps] == [[0, 1], [2, 3], [4, 5]]


def test_a_batch_larger_than_the_data_is_one_step() -> None:
    steps = split_steps(np.arange(3), np.ones(3, np.int64), batch_size=1000, drop_last=False)
    assert [step.tolist() for step in steps] == [[0, 1, 2]]


def test_steps_count_comparisons_and_never_split_a_group() -> None:
    for seed in range(60):
        counts = np.random.default_rng(seed).integers(1, 7, 40)
        order = np.random.default_rng(seed + 1).permutation(40)
        steps = split_steps(order, counts, batch_size=5, drop_last=False)
        assert np.concatenate(steps).tolist() == order.tolist()
        assert all(counts[step].sum() <= 5 or len(step) == 1 for step in steps)
        assert all(counts[a].sum() + counts[b[0]] > 5 for a, b in pairwise(steps))


def test_no_groups_give_no_steps() -> None:
    assert split_steps(np.arange(0), np.ones(0, np.int64), batch_size=4, drop_last=False)[:] == []


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    orders = {
        (seed, epoch): epoch_order(50, seed=seed, epoch=epoch, shuffle=True).tolist()
        for seed in range(3)
        for epoch in range(3)
    }
    assert len({tuple(order) for order in orders.values()}) == 9
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert orders[1, 2] == epoch_order(50, seed=1, epoch=2, shuffle=True).tolist()


def test_shuffle_false_keeps_the_order_of_the_files() -> None:
    assert epoch_order(5, seed=1, epoch=1, shuffle=False).tolist() == [0, 1, 2, 3, 4]


def test_a_mixture_uses_the_groups_of_an_entry_as_often_as_its_weight_says() -> None:
    mixture = Mixture(np.repeat([0, 1, 2, 3], [10, 8, 6, 5]), [1.0, 0.5, 2.0, 0.0])
    counts = [
        np.bincount(epoch_order(29, seed=3, epoch=e, shuffle=True, mixture=mixture), minlength=29) for e in (0, 1)
    ]
    for count in counts:
        assert count[:10].tolist() == [1] * 10
        assert sorted(count[10:18].tolist()) == [0] * 4 + [1] * 4
        assert count[18:24].tolist() == [2] * 6 and not count[24:].any()
    assert (counts[0] + counts[1])[10:18].tolist() == [1] * 8, "the other half in the next epoch"


def test_a_mixture_of_ones_is_no_mixture() -> None:
    mixture = Mixture(np.repeat([0, 1], [4, 6]), [1.0, 1.0])
    for shuffle in (True, False):
        plain = epoch_order(10, seed=1, epoch=2, shuffle=shuffle)
        assert epoch_order(10, seed=1, epoch=2, shuffle=shuffle, mixture=mixture).tolist() == plain.tolist()


def make_plan(sizes: GroupSizes, *, seed: int = 0, **options: int) -> Plan:
    config = PackingConfig(train_batch_size=options.pop("train_batch_size", 8))
    return Plan(sizes, config, token_budget=600, seed=seed, **options)


def test_an_epoch_uses_every_group_once() -> None:
    sizes = random_sizes(0, 53, responses=(2, 4))
    plan = make_plan(sizes, world_size=2)
    for epoch in range(3):
        groups = [group for step in plan.epoch_steps(epoch) for pack in packs_of(plan.step(step)) for group in pack]
        assert sorted(groups) == list(range(53))


def test_a_plan_does_not_depend_on_what_was_asked_before() -> None:
    sizes = random_sizes(0, 30)
    forward, backward = make_plan(sizes), make_plan(sizes)
    first = [[step.tolist() for step in forward.epoch_steps(epoch)] for epoch in (0, 1, 2)]
    second = [[step.tolist() for step in backward.epoch_steps(epoch)] for epoch in (2, 1, 0)]
    assert first == second[::-1]
    assert forward.num_steps(3) == sum(map(len, first))


def test_the_pairs_of_a_step_do_not_depend_on_the_number_of_ranks() -> None:
    sizes = random_sizes(0, 30)
    one, three = make_plan(sizes), make_plan(sizes, world_size=3)
    for alone, shared in zip(one.epoch_steps(0), three.epoch_steps(0), strict=True):
        assert alone.tolist() == shared.tolist()
        assert one.step(alone).num_comparisons == three.step(shared).num_comparisons


def test_the_fingerprint_tells_what_decides_the_plan() -> None:
    sizes = random_sizes(0, 30)
    same = make_plan(sizes).fingerprint()
    assert same == make_plan(sizes, world_size=2).fingerprint()
    assert same != make_plan(sizes, seed=1).fingerprint()
    assert same != make_plan(sizes, train_batch_size=4).fingerprint()
    assert same != make_plan(random_sizes(1, 30)).fingerprint()


def test_a_budget_below_the_longest_group_names_the_row() -> None:
    sizes = GroupSizes(np.array([5, 9]), np.array([4, 6]), np.array([2, 2]), np.array([1, 1]))
    where = ["a:0", "a:1"].__getitem__
    assert check_budget(sizes, where, token_budget=9, key="data.x") is None
    assert check_budget(sizes, where, token_budget=8, key="data.x") == (
        "a:1: a group of 9 tokens does not fit into a micro-batch of 8; "
        "set data.x to at least 9, or lower data.max_length"
    )
    assert "a group of 12 tokens" in str(check_budget(sizes, where, token_budget=11, key="data.x", padded=True))


def test_the_token_budget_has_room_for_so_many_longest_pairs() -> None:
    assert PackingConfig(micro_batch_size_per_gpu=3).token_budget(100) == 600
    assert PackingConfig(micro_batch_size_per_gpu=3, max_tokens_per_micro_batch=50).token_budget(100) == 50
