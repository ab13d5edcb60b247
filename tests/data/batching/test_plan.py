"""Packing: the groups of every step, in an order that seed and epoch decide."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from rm_gallery.data.batching.bin_packing import Packer
from rm_gallery.data.batching.plan import Mixture, PackingConfig, Plan, epoch_order, long_pairs, split_steps
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.tokenization.token_group import Origin
from rm_gallery.schema import Comparison
from tests.data.groups import random_sizes, token_group


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


def test_prompts_kept_together_follow_each_other_in_runs() -> None:
    prompts = np.repeat([5, 2, 9, 7], [3, 1, 40, 4])
    mixed = np.random.default_rng(1).permutation(48)
    orders = [
        epoch_order(48, seed=3, epoch=epoch, shuffle=True, prompts=prompts[mixed]).tolist() for epoch in (0, 1, 0)
    ]
    assert orders[0] == orders[2] != orders[1]
    for order in orders:
        assert sorted(order) == list(range(48))
        kept = prompts[mixed][order]
        changes = np.flatnonzero(np.diff(kept))
        assert len(changes) <= 5  # 6 runs: of 3, 1 and 4, and of 16, 16 and 8
    alone = [epoch_order(48, seed=3, epoch=0, shuffle=True, prompts=np.zeros(48)).tolist() for _ in range(2)]
    assert alone[0] == alone[1] != sorted(alone[0])
    assert epoch_order(0, seed=0, epoch=0, shuffle=True, prompts=np.zeros(0)).tolist() == []


def make_plan(seed: int = 0, *, of: int = 0, packer: Packer | None = None, **options: Any) -> Plan:
    config = PackingConfig(**{"train_batch_size": 8, **options})
    return Plan(random_sizes(of, 30), config, packer or Packer(600), seed=seed, prompts=np.arange(30) // 3)


def test_a_plan_does_not_depend_on_what_was_asked_before() -> None:
    forward, backward = make_plan(), make_plan()
    first = [[step.tolist() for step in forward.epoch_steps(epoch)] for epoch in (0, 1, 2)]
    second = [[step.tolist() for step in backward.epoch_steps(epoch)] for epoch in (2, 1, 0)]
    assert first == second[::-1]
    assert forward.num_steps(3) == sum(map(len, first))


def test_the_pairs_of_a_step_depend_neither_on_the_ranks_nor_on_sharing() -> None:
    expected = [step.tolist() for step in make_plan().epoch_steps(0)]
    for plan in (make_plan(packer=Packer(600, 3)), make_plan(share_prompts=False)):
        assert [step.tolist() for step in plan.epoch_steps(0)] == expected


def test_the_fingerprint_tells_what_decides_the_plan() -> None:
    packer = Packer(600)
    same = make_plan().fingerprint()
    assert same == make_plan(packer=replace(packer, world_size=2)).fingerprint()
    others = [
        make_plan(seed=1), make_plan(train_batch_size=4), make_plan(of=1), make_plan(share_prompts=False),
        make_plan(keep_prompts_together=True),
        *(make_plan(packer=replace(packer, **{key: value})) for key, value in
          {"token_budget": 700, "padded": True, "attention_length": 99}.items()),
    ]  # fmt: skip
    assert len({same, *(other.fingerprint() for other in others)}) == len(others) + 1


def test_pairs_above_the_budget_are_counted_and_the_longest_is_named() -> None:
    groups = [
        token_group([1] * 3, [[2] * 2, [3] * 4]),
        token_group([1] * 2, [[2] * 5, [3] * 5, [4]], Comparison(0, 1), Comparison(0, 2), Comparison(1, 2)),
        token_group([], [[2], [3] * 7]),
    ]
    data = TokenData.from_groups((group, Origin("a.parquet", row)) for row, group in enumerate(groups))
    assert long_pairs(data, Packer(12), key="data.x") is None
    assert long_pairs(data, Packer(8), key="data.x") == (
        "2 pairs exceed the token budget of a micro-batch (8), and each gets a micro-batch alone; the longest, "
        "a.parquet:1, has 12 tokens. If memory runs out, lower data.max_length; to fit all pairs, "
        "set data.x to at least 12"
    )
    padded = long_pairs(data, Packer(13, padded=True), key="data.x")
    assert padded is not None and padded.startswith("5 pairs") and "a.parquet:0, has 14" in padded


def test_the_token_budget_has_room_for_so_many_longest_pairs() -> None:
    assert PackingConfig(micro_batch_size_per_gpu=3).token_budget(100) == 600
    assert PackingConfig(micro_batch_size_per_gpu=3, max_tokens_per_micro_batch=50).token_budget(100) == 50
