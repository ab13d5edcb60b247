"""Objectives on pairs: their formulas, TRL's loss, gradients, extreme rewards, micro-batches."""

from __future__ import annotations

import math
import random
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rm_gallery.data.batching.bin_packing import Packer
from rm_gallery.data.batching.packed_batch import PackedBatch, collate
from rm_gallery.data.batching.prompt_sharing import plan_step
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.tokenization.token_group import Origin, TokenGroup, split_prefix
from rm_gallery.modeling.forward import pad_texts
from rm_gallery.objectives import OBJECTIVES, build_objective
from rm_gallery.objectives.metrics import Sums
from rm_gallery.schema import Comparison
from rm_gallery.training.objective_config import OPTIONS_OF

BOUNDED = {"center_coefficient": 0.1, "reward_l2": 0.2}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("bradley_terry", {}), ("bradley_terry", BOUNDED), ("margin", {}), ("margin", {"margin_form": "hinge"}),
    ("scaled", {}), ("soft", {}), ("soft", {"label_smoothing": 0.1}), ("focal", {}), ("focal", {"focal_gamma": 0.5}),
    ("hinge", {"hinge_margin": 1.5}), ("scaled", BOUNDED),
]  # fmt: skip


def pairs(count: int, seed: int = 0) -> PackedBatch:
    """Response 2i is better than 2i + 1, with random weights and labels."""
    draw = random.Random(seed)
    comparisons = [
        Comparison(2 * i, 2 * i + 1, draw.uniform(0.5, 2), draw.choice([0.0, 1.0, 3.0]), draw.uniform(0.3, 1))
        for i in range(count)
    ]
    tails = [np.array([number], np.int32) for number in range(2 * count)]
    return collate([TokenGroup(np.zeros(0, np.int32), tails, comparisons)])


def by_hand(name: str, options: dict[str, Any], d: float, margin: float, share: float) -> float:
    p = 1 / (1 + math.exp(-d))
    smoothing = options.get("label_smoothing", 0)
    q = share * (1 - smoothing) + (1 - share) * smoothing
    return {
        "bradley_terry": -math.log(p),
        "margin": max(0, margin - d) if options.get("margin_form") else -math.log(1 / (1 + math.exp(margin - d))),
        "scaled": -margin * math.log(p),
        "soft": -q * math.log(p) - (1 - q) * math.log(1 - p),
        "focal": -((1 - 2 * max(0, p - 0.5)) ** options.get("focal_gamma", 2)) * math.log(p),
        "hinge": max(0, options.get("hinge_margin", 1) - d),
    }[name]


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_loss_and_gradient_are_those_of_the_formula(name: str, options: dict[str, Any]) -> None:
    objective, batch = build_objective(name, (), options), pairs(6)
    rewards = (2 * torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).requires_grad_()
    expected = 0.0
    for i in range(6):
        better, worse = rewards[2 * i].item(), rewards[2 * i + 1].item()
        value = by_hand(name, options, better - worse, batch.margin[i].item(), batch.p_better[i].item())
        value += options.get("center_coefficient", 0) * (better + worse) ** 2
        value += options.get("reward_l2", 0) * (better**2 + worse**2) / 2
        expected += batch.weight[i].item() * value
    assert objective(rewards, batch)[0].item() == pytest.approx(expected, rel=1e-6)
    assert torch.autograd.gradcheck(lambda values: objective.loss(values, batch), rewards)


@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_margin_and_centering_are_those_of_trl(coefficient: float) -> None:
    """RewardTrainer.compute_loss of TRL: with the column `margin`, and with `center_rewards_coefficient`."""
    chosen, rejected = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) * 3
    batch = pairs(32)
    margin, rewards = batch.margin, torch.stack([chosen, rejected], 1).flatten()
    with_margin = -F.logsigmoid(chosen - rejected - margin).mean()
    plain = -F.logsigmoid(chosen - rejected).mean()
    centering = coefficient * torch.mean((chosen + rejected) ** 2)
    batch.weight.fill_(1.0)
    for name, expected in (("margin", with_margin), ("bradley_terry", plain)):
        objective = build_objective(name, (), {"center_coefficient": coefficient})
        found = objective(rewards, batch)[0] / 32
        assert found.item() == pytest.approx((expected + centering).item(), abs=1e-6)


@pytest.mark.parametrize(("name", "options"), KINDS)
@pytest.mark.parametrize("difference", [1e4, -1e4, 0.0])
def test_extreme_rewards_stay_finite(name: str, options: dict[str, Any], difference: float) -> None:
    rewards = torch.tensor([difference, 0.0], requires_grad=True)
    loss, _ = build_objective(name, (), options)(rewards, pairs(1))
    loss.backward()
    assert rewards.grad is not None
    assert torch.isfinite(loss) and torch.isfinite(rewards.grad).all()


def test_options_are_keys_of_the_configuration() -> None:
    objective: Any  # a dataclass
    for name, objective in OBJECTIVES.items():
        own = {each.name for each in fields(objective) if each.init} - {"names", "first"}
        # Of the optimizer, of the data, of a class of its own, of the plan, of the model's second loss.
        elsewhere = {"threshold_lr", "score_column", "bins", "regression_steps", "regression_ratio", "lm_coefficient"}
        assert own == {option for option, names in OPTIONS_OF.items() if name in names} - elsewhere, name


def ranked_groups(count: int = 12) -> list[tuple[TokenGroup, Origin]]:
    """Groups of two to four responses with labels; some have the same prompt, and some the same response."""
    draw, found = random.Random(0), []
    for number in range(count):
        prompt = [9] * 12 + [number % 4] * 8
        texts = [[*prompt, place, *(draw.randrange(2) for _ in range(3))] for place in range(draw.randint(2, 4))]
        level = [draw.randrange(3) for _ in texts]
        level[:2] = [2, 0]
        comparisons = [
            Comparison(i, j, 1.0 + number % 2, float(level[i] - level[j]), 0.5 + (level[i] - level[j]) / 4)
            for i in range(len(texts)) for j in range(len(texts)) if level[i] > level[j]
        ]  # fmt: skip
        found.append((split_prefix(texts, comparisons), Origin("a", number, "", number % 4)))
    return found


def rewards_of(batch: PackedBatch) -> torch.Tensor:
    """Stands for a model: a number that depends on the whole text alone."""
    texts = pad_texts(batch, 0)[0].double()[: len(batch.reward_index)]
    return (texts * torch.arange(1, texts.shape[1] + 1).sqrt()).sum(1).float() / 10


def sums_for(name: str, options: dict[str, Any], data: TokenData) -> list[dict[str, float]]:
    """Loss sum, metrics and divisor of one step, for several token budgets and ranks, with and without sharing."""
    objective, found = build_objective(name, (), options), []
    for budget, ranks, share in ((10_000, 1, False), (30, 1, False), (150, 1, True), (400, 2, True)):
        step = plan_step(data, np.arange(len(data)), Packer(budget, ranks, attention_length=50), share_prompts=share)
        sums = Sums()
        for packs in step.packs:
            for pack in packs:
                batch = collate(step.load(data, pack))
                sums.add(objective(rewards_of(batch), batch)[1])
        found.append({**sums.read(), "count": step.num_comparisons})
    return found


def test_sums_do_not_depend_on_micro_batches_sharing_and_ranks() -> None:
    data = TokenData.from_groups(ranked_groups())
    for name, options in (("scaled", BOUNDED), ("soft", {})):
        found = sums_for(name, options, data)
        for other in found[1:]:
            assert other == pytest.approx(found[0], rel=1e-5)
