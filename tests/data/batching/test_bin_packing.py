"""Micro-batches: every group once, within the budget, as few as a step allows, all ranks with like work."""

from __future__ import annotations

import time

import numpy as np
import pytest

from rm_gallery.data.batching.bin_packing import Packer, Packs, attention_length
from rm_gallery.data.token_cache.arrays import GroupSizes
from tests.data.groups import random_sizes


def flat(packs: Packs) -> list[list[int]]:
    return [pack for rank in packs for pack in rank]


def pairs(tokens: np.ndarray) -> GroupSizes:
    """Pairs of equal responses without a common prefix."""
    ones = np.ones(len(tokens), np.int64)
    return GroupSizes(tokens, (tokens + 1) // 2, ones * 2, ones)


def log_normal(seed: int, count: int) -> GroupSizes:
    """Pairs as chats have them: a prompt and two responses, medians of 200 tokens, cut at 2,048."""
    draw = np.random.default_rng(seed)
    prompt, first, second = np.exp(draw.normal(np.log(200), 0.8, (3, count))).clip(1, 2048).astype(np.int32)
    twos = np.full(count, 2, np.int32)
    return GroupSizes(prompt + first + second, prompt + np.maximum(first, second), twos, twos // 2)


def rank_costs(packs: Packs, packer: Packer, sizes: GroupSizes) -> np.ndarray:
    return np.array([packer.pack_costs(rank, sizes).sum() for rank in packs])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_step_holds_each_group_once_within_the_budget_and_equally_many_packs_per_rank(
    world_size: int, padded: bool
) -> None:
    for seed in range(60):
        sizes = random_sizes(seed, 1 + seed, responses=(1, 5))
        budget = int((sizes.longest_text * sizes.num_responses).max()) + seed % 300
        packer = Packer(budget, world_size, padded, attention_length=100)
        packs = packer.pack(sizes)
        assert sorted(group for pack in flat(packs) for group in pack) == list(range(len(sizes)))
        assert len(packs) == world_size
        assert len({len(rank) for rank in packs}) == 1
        assert max(packer.pack_tokens(flat(packs), sizes)) <= budget


@pytest.mark.parametrize("padded", [False, True])
def test_a_group_above_the_budget_has_a_micro_batch_of_its_own(padded: bool) -> None:
    sizes = pairs(np.array([30, 2000, 40, 50, 900]))
    packs = flat(Packer(200, 2, padded).pack(sizes))
    assert [1] in packs and [4] in packs
    assert sorted(group for pack in packs for group in pack) == list(range(5))


def test_a_pack_may_be_full_to_the_last_token_and_no_fuller() -> None:
    for lengths, budget, num_packs in (([6, 4], 10, 1), ([6, 6, 5], 11, 2), ([6, 6, 5], 10, 3)):
        assert len(flat(Packer(budget).pack(pairs(np.array(lengths))))) == num_packs


def test_a_tight_step_takes_no_more_micro_batches_than_it_must() -> None:
    # Longest first would put 5 and 5, then 4 with 4 and 3: three do not fit. Best fit finds the two full ones.
    sizes = pairs(np.array([5, 5, 4, 3, 3]))
    packs = flat(Packer(10).pack(sizes))
    assert sorted(Packer(10).pack_tokens(packs, sizes).tolist()) == [10, 10]


def test_the_number_of_micro_batches_is_within_half_a_percent_of_its_lower_bound_on_realistic_lengths() -> None:
    for seed in range(10):
        sizes = log_normal(seed, 256)
        for world_size in (1, 8):
            packs = Packer(8192, world_size).pack(sizes)
            least = -(-int(1.005 * sizes.tokens.sum()) // 8192)
            assert len(packs[0]) <= -(-least // world_size)


def test_no_pack_is_empty_when_there_are_groups_enough() -> None:
    assert all(flat(Packer(400, 4).pack(random_sizes(0, 64))))


@pytest.mark.parametrize("padded", [False, True])
def test_fewer_groups_than_ranks_leave_empty_packs(padded: bool) -> None:
    packer = Packer(1000, 3, padded)
    assert sorted(map(len, flat(packer.pack(random_sizes(0, 2))))) == [0, 1, 1]
    assert flat(packer.pack(random_sizes(0, 2).of(np.arange(0)))) == []


@pytest.mark.parametrize("hidden_size", [512, 4096])
@pytest.mark.parametrize("world_size", [8, 64, 256])
@pytest.mark.slow
def test_the_slowest_rank_has_at_most_three_percent_more_than_the_mean(world_size: int, hidden_size: int) -> None:
    for budget in (8192, 32768):
        packer = Packer(budget, world_size, attention_length=attention_length(hidden_size))
        for seed in range(5):
            for groups_per_rank in (16, 33):
                sizes = log_normal(seed, groups_per_rank * world_size)
                costs = rank_costs(packer.pack(sizes), packer, sizes)
                assert costs.max() <= 1.03 * costs.mean()


def test_texts_that_are_padded_are_balanced_too() -> None:
    packer = Packer(8192, 8, padded=True)
    for seed in range(5):
        sizes = log_normal(seed, 8 * 32)
        costs = rank_costs(packer.pack(sizes), packer, sizes)
        assert costs.max() <= 1.1 * costs.mean()


def test_long_texts_count_for_their_attention() -> None:
    tokens = np.array([4000] + [100] * 40)  # as many tokens in one text as in forty
    two = Packer(4000, 2, attention_length=2000).pack(pairs(tokens))
    assert two[0][0] == [0] and len(two[0]) == len(two[1])
    packer = Packer(10**6, 2, attention_length=2000)
    first, second = packer.pack(pairs(tokens[:30]))
    assert first == [[0]] and len(second[0]) == 29
    assert Packer(10**6, attention_length=1000).costs(pairs(np.array([1000]))).tolist() == [1500]


def test_groups_just_above_half_the_budget_are_planned_without_long_search() -> None:
    lengths = np.random.default_rng(0).integers(4097, 4600, 4096)
    start = time.process_time()
    packs = flat(Packer(8192).pack(pairs(lengths)))
    assert time.process_time() - start < 2.0  # adding one pack at a time takes about 10 s
    assert len([pack for pack in packs if pack]) == 4096


def test_the_same_sizes_give_the_same_packs_in_every_type_of_whole_number() -> None:
    sizes = log_normal(0, 500)
    wide = GroupSizes(sizes.tokens.astype(np.int64), sizes.longest_text.astype(np.int64), sizes.num_responses,
                      sizes.num_comparisons)  # fmt: skip
    assert Packer(8192, 3).pack(sizes) == Packer(8192, 3).pack(wide)


def test_inference_packs_neighbours_in_length_within_the_budget() -> None:
    ones = np.ones(5, np.int64)
    sizes = GroupSizes(tokens := np.array([30, 60, 20, 50, 40]), tokens, ones, ones * 0)
    for padded in (False, True):
        assert Packer(100, padded=padded).pack_by_length(sizes) == [[1], [3, 4], [0, 2]]
        assert Packer(10, padded=padded).pack_by_length(sizes) == [[1], [3], [4], [0], [2]]
        assert Packer(10, padded=padded).pack_by_length(sizes.of(np.arange(0))) == []
    # Without padding a group counts its own tokens, so that the prefix of many responses is counted once.
    wide = GroupSizes(np.array([60, 40, 30]), np.array([20, 10, 30]), np.array([5, 4, 1]), ones[:3])
    assert Packer(100).pack_by_length(wide) == [[2, 0], [1]]
    assert Packer(100, padded=True).pack_by_length(wide) == [[2], [0], [1]]
