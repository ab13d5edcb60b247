"""Sharing: whatever is merged or cut, every comparison of a step is computed once, of the same two texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest

from rm_gallery.data.batching.bin_packing import Packer
from rm_gallery.data.batching.prompt_sharing import StepPlan, plan_step, sizes_of, split_responses
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.tokenization.token_group import Origin, TokenGroup, split_prefix
from rm_gallery.schema import Comparison
from tests.data.groups import token_group
from tests.small import same_prompt_groups


def stored(*by_prompt: Sequence[TokenGroup]) -> TokenData:
    """Groups, one list of them for each prompt."""
    return TokenData.from_groups(
        (group, Origin(prompt_hash=prompt)) for prompt, groups in enumerate(by_prompt) for group in groups
    )


def everything(data: TokenData) -> np.ndarray:
    return np.arange(len(data))


def compared(groups: Sequence[TokenGroup]) -> Counter[tuple[object, ...]]:
    """Every comparison with its two whole texts."""
    found: Counter[tuple[object, ...]] = Counter()
    for group in groups:
        texts = [(*group.prefix.tolist(), *tail.tolist()) for tail in group.tails]
        for each in group.comparisons:
            found[texts[each.better], texts[each.worse], each.weight, each.margin, each.p_better] += 1
    return found


def loaded(data: TokenData, plan: StepPlan) -> list[TokenGroup]:
    return [group for rank in plan.packs for pack in rank for group in plan.load(data, pack)]


def tokens(groups: Sequence[TokenGroup]) -> int:
    return sum(len(group.prefix) + sum(map(len, group.tails)) for group in groups)


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_all_ranks_together_compute_every_comparison_once_and_keep_to_the_budget(world_size: int, padded: bool) -> None:
    merged = pieces = 0
    for seed in range(16):  # one ranking has 1 + seed responses
        data = stored(*same_prompt_groups(seed))
        for budget in (80, 1000):
            packer = Packer(budget, world_size, padded, attention_length=1000)
            plan = plan_step(data, everything(data), packer)
            groups = loaded(data, plan)
            assert compared(groups) == compared([data[i] for i in range(len(data))])
            assert plan.num_comparisons == sum(len(group.comparisons) for group in groups)
            assert len({len(rank) for rank in plan.packs}) == 1
            for rank in plan.packs:
                for pack, cost in zip(rank, packer.pack_tokens(rank, sizes_of(plan.units)), strict=True):
                    assert cost <= budget or [plan.units[number].num_comparisons for number in pack] == [1]
            merged += sum(len(unit.parts) > 1 for unit in plan.units)
            pieces += sum(unit.parts[0].comparisons is not None for unit in plan.units)
    assert merged > 10 and pieces > 100


@pytest.mark.parametrize("padded", [False, True])
def test_units_say_what_they_hold(padded: bool) -> None:
    for seed in range(6):
        data = stored(*same_prompt_groups(seed))
        plan = plan_step(data, everything(data), Packer(150, 2, padded))
        for number, unit in enumerate(plan.units):
            [group] = plan.load(data, [number])
            tails = [len(tail) for tail in group.tails]
            assert min(tails) > 0
            assert unit.tokens == tokens([group])
            assert unit.longest_text == len(group.prefix) + max(tails)
            assert (unit.num_responses, unit.num_comparisons) == (len(tails), len(group.comparisons))


def test_pairs_of_a_prompt_become_one_group_with_each_response_once() -> None:
    data = stored(
        [token_group([1, 2, 3], [[4, 5], [6]]), token_group([1, 2, 3], [[4, 5], [7, 8]]),
         token_group([1, 2, 3], [[7, 8], [6]])],
        [token_group([1, 2, 3], [[4, 5], [6]])],
    )  # fmt: skip
    plan = plan_step(data, everything(data), Packer(1000))
    alone, together = sorted(loaded(data, plan), key=lambda group: len(group.tails))
    assert [part.group for unit in plan.units for part in unit.parts if len(unit.parts) == 1] == [3]
    assert len(alone.tails) == 2
    assert together.prefix.tolist() == [1, 2, 3]
    assert sorted(tail.tolist() for tail in together.tails) == [[4, 5], [6], [7, 8]]
    assert len(together.comparisons) == 3


def test_a_group_that_a_step_holds_twice_is_computed_once_and_counts_twice() -> None:
    data = stored([token_group([1, 2], [[4], [5, 6]])])
    plan = plan_step(data, np.array([0, 0]), Packer(1000))
    [group] = loaded(data, plan)
    assert tokens([group]) == 5
    assert [(each.better, each.worse) for each in group.comparisons] == [(0, 1), (0, 1)]
    assert plan.num_comparisons == 2


def test_prefixes_of_different_length_are_found_again() -> None:
    # The second pair's responses begin alike; the third's common prefix ends inside the prompt.
    data = stored([
        split_prefix([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]], [Comparison(0, 1)]),
        split_prefix([[1, 2, 3, 4, 7, 7, 8], [1, 2, 3, 4, 7, 7, 9]], [Comparison(1, 0)]),
        split_prefix([[1, 2, 3, 4], [1, 2, 3, 4, 5]], [Comparison(0, 1)]),
    ])  # fmt: skip
    plan = plan_step(data, everything(data), Packer(1000))
    groups = loaded(data, plan)
    assert compared(groups) == compared([data[i] for i in range(3)])
    assert tokens(groups) < data.num_tokens


def test_nothing_is_merged_where_that_saves_no_token() -> None:
    apart = [token_group([], [[1], [2]]), token_group([], [[3], [4]])]  # equal prompts, nothing in common
    openings = [token_group([1, 2, 2, 2], [[3], [4]]), token_group([1, 5, 5, 5], [[3], [4]])]
    for groups in (apart, openings):
        data = stored(groups)
        assert [len(unit.parts) for unit in plan_step(data, everything(data), Packer(1000)).units] == [1, 1]


def test_switched_off_every_group_stays_as_it_is() -> None:
    data = stored(*same_prompt_groups(0))
    packer = Packer(10_000)
    plan = plan_step(data, everything(data), packer, share_prompts=False)
    assert [[part.group for part in unit.parts] for unit in plan.units] == [[i] for i in range(len(data))]
    assert plan.packs == packer.pack(data.sizes)


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_step_is_never_estimated_slower_for_its_shared_prompts(world_size: int) -> None:
    for seed in range(10):
        data = stored(*same_prompt_groups(seed))
        packer = Packer(300, world_size)
        on, off = (plan_step(data, everything(data), packer, share_prompts=share) for share in (True, False))
        costs = [packer.step_cost(plan.packs, sizes_of(plan.units)) for plan in (on, off)]
        assert costs[0] <= costs[1]
        assert tokens(loaded(data, on)) <= tokens(loaded(data, off))


def test_ranks_stay_balanced_when_all_pairs_have_one_prompt() -> None:
    draw = np.random.default_rng(0)
    lengths = np.exp(draw.normal(np.log(20), 0.6, (2, 8 * 32))).astype(int) + 1
    prompt = list(range(50, 65))
    data = stored([
        token_group(prompt, [draw.integers(0, 50, a).tolist(), draw.integers(0, 50, b).tolist()])
        for a, b in lengths.T
    ])  # fmt: skip
    packer = Packer(8192, 8)
    plan = plan_step(data, everything(data), packer)
    costs = np.array([packer.pack_costs(rank, sizes_of(plan.units)).sum() for rank in plan.packs])
    assert costs.max() <= 1.03 * costs.mean()
    assert tokens(loaded(data, plan)) < 0.85 * data.num_tokens


@pytest.mark.parametrize("padded", [False, True])
def test_sixteen_ranked_responses_train_on_a_budget_of_a_few(padded: bool) -> None:
    ranked = [Comparison(better, worse) for better, worse in combinations(range(16), 2)]
    data = stored([token_group([1] * 20, [[number] * 10 for number in range(2, 18)], *ranked)])
    for responses, most in ((2, 120), (3, 45), (4, 28), (8, 7), (16, 1)):
        budget = responses * 30 if padded else 20 + responses * 10
        plan = plan_step(data, everything(data), Packer(budget, padded=padded))
        assert compared(loaded(data, plan)) == compared([data[0]])
        assert sum(unit.num_comparisons for unit in plan.units) == 120
        assert len(plan.units) <= most  # as few as cover the pairs would be 120, 35, 20, 6 and 1
        assert max(unit.num_responses for unit in plan.units) == responses


def test_a_pair_above_the_budget_is_a_unit_of_its_own() -> None:
    data = stored([token_group([1] * 5, [[2] * 50, [3] * 50, [4]], Comparison(0, 1), Comparison(2, 1))])
    plan = plan_step(data, everything(data), Packer(60))
    assert sorted(unit.tokens for unit in plan.units) == [56, 105]


def test_a_plan_depends_on_its_arguments_alone() -> None:
    data = stored(*same_prompt_groups(3))
    groups = np.random.default_rng(0).permutation(len(data))
    first = plan_step(data, groups, Packer(150, 3))
    plan_step(data, groups[::-1], Packer(90))
    assert plan_step(data, groups.copy(), Packer(150, 3)) == first


@pytest.mark.parametrize("padded", [False, True])
def test_a_group_without_comparisons_is_split_in_the_order_of_its_responses(padded: bool) -> None:
    prefix = np.arange(4, dtype=np.int32)
    group = TokenGroup(prefix, [np.full(size, 9, np.int32) for size in (3, 2, 5, 9)], ())
    parts = split_responses(group, Packer(14 if padded else 10, padded=padded))
    assert [[len(tail) for tail in part.tails] for part in parts] == [[3, 2], [5], [9]]
    assert all(part.prefix is prefix for part in parts)
    assert split_responses(group, Packer(100, padded=padded)) == [group]
