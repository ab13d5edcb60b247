"""The Plackett-Luce loss: by hand, ties against their exact likelihood, gradients, rankings that are never cut."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch

from rm_gallery.data.batching.bin_packing import Packer
from rm_gallery.data.batching.packed_batch import PackedBatch, collate
from rm_gallery.data.batching.prompt_sharing import plan_step
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.tokenization.token_group import Origin, TokenGroup, is_ranking, ranks_of
from rm_gallery.errors import UserError
from rm_gallery.objectives import build_objective
from rm_gallery.objectives.bradley_terry import bradley_terry
from rm_gallery.schema import Comparison, Rating
from tests.objectives.test_pairwise import ranked_groups, sums_for

OBJECTIVE = build_objective("plackett_luce")


def ranking(*ranks: int, weight: float = 1.0) -> PackedBatch:
    tails = [np.array([place], np.int32) for place in range(len(ranks))]
    ratings = [Rating(place, rank=rank, weight=weight) for place, rank in enumerate(ranks)]
    pairs = [Comparison(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]
    return collate([TokenGroup(np.zeros(0, np.int32), tails, pairs, ratings)])


def exact(rewards: list[float], ranks: list[int]) -> float:
    """Negative log of the probability of all orders in which tied responses may be."""
    total = 0.0
    for order in permutations(range(len(ranks))):
        if [ranks[i] for i in order] == sorted(ranks):
            powers = [math.exp(rewards[i]) for i in order]
            total += math.prod(power / sum(powers[place:]) for place, power in enumerate(powers))
    return -math.log(total)


def test_rankings_without_ties_have_the_exact_likelihood() -> None:
    rewards = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)
    for ranks in permutations(range(4)):
        found = OBJECTIVE(rewards, ranking(*ranks, weight=2.0))[0].item()
        assert found == pytest.approx(2 * exact(rewards.tolist(), list(ranks)))
    pair = ranking(1, 0)
    assert OBJECTIVE(rewards[:2], pair)[0].item() == pytest.approx(bradley_terry(rewards[:2], pair)[0].item())


def test_ties_are_those_of_efron_and_exact_for_equal_rewards() -> None:
    e, efron = math.exp, build_objective("plackett_luce", (), {"ties": "efron"})
    found = efron(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64), ranking(0, 0, 1))[0].item()
    whole, tied = e(2) + e(1) + 1, e(2) + e(1)
    assert found == pytest.approx(-math.log(2 * e(2) * e(1) / (whole * (whole - tied / 2))))
    for ranks in ([0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]):
        rewards = [0.7 if rank == 0 else -0.2 for rank in ranks]
        loss = efron(torch.tensor(rewards, dtype=torch.float64), ranking(*ranks))[0].item()
        assert loss == pytest.approx(exact(rewards, ranks), abs=1e-9)


@pytest.mark.parametrize(
    "ranks", [(0, 0, 1), (1, 0, 0, 2, 2), (0, 0, 0, 0, 0, 0, 1), (1, 0, 1, 0, 1), (0, 0, 0), (2, 2, 0, 1, 1, 1, 1)]
)
def test_tied_responses_have_the_likelihood_of_all_their_orders(ranks: tuple[int, ...]) -> None:
    rewards = torch.randn(len(ranks), dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    assert OBJECTIVE(rewards, ranking(*ranks))[0].item() == pytest.approx(
        exact(rewards.tolist(), list(ranks)), abs=1e-9
    )


def test_larger_ties_are_those_of_efron_but_for_the_last() -> None:
    rewards = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    efron = build_objective("plackett_luce", (), {"ties": "efron"})
    above, last = ranking(*[0] * 8, 1), ranking(0, *[1] * 8)
    assert OBJECTIVE(rewards, above)[0].item() == pytest.approx(efron(rewards, above)[0].item())
    assert OBJECTIVE(rewards, last)[0].item() == pytest.approx((rewards.logsumexp(0) - rewards[0]).item())
    data = TokenData.from_groups([(TokenGroup(np.zeros(0, np.int32), [np.array([i], np.int32) for i in range(9)],
                                              [Comparison(i, 8) for i in range(8)]), Origin("a", 3))])  # fmt: skip
    with pytest.raises(UserError, match=r"a:3: 8 tied responses are above others.* at most 6; set objective.ties=auto"):
        data.as_rankings(6)


def test_a_pair_has_the_bounds_of_bradley_terry_and_a_ranking_those_of_its_mean() -> None:
    bounds = {"center_coefficient": 0.1, "reward_l2": 0.2}
    rewards = torch.tensor([2.0, -1.0, 4.0], dtype=torch.float64)
    pair, two = ranking(0, 1, weight=3.0), build_objective("bradley_terry", (), bounds)
    pair_weight = replace(pair, weight=pair.rating_weight[:1])
    bound = build_objective("plackett_luce", (), bounds)
    assert bound(rewards[:2], pair)[0].item() == pytest.approx(two(rewards[:2], pair_weight)[0].item())
    batch = ranking(0, 0, 1)
    added = 0.1 * (2 * 5 / 3) ** 2 + 0.2 * 21 / 3
    assert bound(rewards, batch)[0].item() == pytest.approx(OBJECTIVE(rewards, batch)[0].item() + added)


@pytest.mark.parametrize("ties", ["auto", "efron"])
def test_gradients_and_extreme_rewards(ties: str) -> None:
    objective = build_objective("plackett_luce", (), {"ties": ties, "center_coefficient": 0.1, "reward_l2": 0.1})
    batch = ranking(2, 0, 1, 1, 2)
    rewards = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: objective.loss(values, batch), rewards)
    extreme = torch.tensor([1e4, -1e4, 0.0, 1e4, -1e4], requires_grad=True)
    objective(extreme, batch)[0].backward()
    assert extreme.grad is not None and torch.isfinite(extreme.grad).all()
    empty = torch.zeros(0, requires_grad=True)
    loss, sums = objective(empty, collate([]))
    loss.backward()
    assert loss.item() == 0 and objective.means({name: float(each) for name, each in sums.items()}, "val") == {}


def test_a_ranking_is_never_cut_and_sums_do_not_depend_on_sharing_and_ranks() -> None:
    data = TokenData.from_groups(ranked_groups())
    data.as_rankings()
    found = sums_for("plackett_luce", {}, data)
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)
    step = plan_step(data, np.arange(len(data)), Packer(30, attention_length=50))
    assert all(part.comparisons is None for unit in step.units for part in unit.parts)
    assert max(unit.tokens for unit in step.units) > 30
    assert found[0]["count"] == found[0]["rankings"] == len(data)


def test_only_rankings_are_accepted() -> None:
    comparisons = [Comparison(2, 0), Comparison(2, 1), Comparison(0, 3), Comparison(1, 3), Comparison(2, 3)]
    assert ranks_of(comparisons) == {2: 0, 0: 1, 1: 1, 3: 2}
    tails = [np.array([place], np.int32) for place in range(4)]
    wrong = ([Comparison(0, 1), Comparison(1, 2), Comparison(2, 0)], [Comparison(0, 1), Comparison(2, 3)],
             [Comparison(0, 1), Comparison(0, 2, 2.0)])  # fmt: skip
    for each in wrong:
        group = TokenGroup(np.zeros(0, np.int32), tails, each)
        assert not is_ranking(group)
        with pytest.raises(UserError, match="a:3: not a ranking"):
            TokenData.from_groups([(group, Origin("a", 3))]).as_rankings()
