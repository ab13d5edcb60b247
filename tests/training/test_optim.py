"""Schedules at their corners, and which parameters decay."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from rm_gallery.training.config import OptimConfig
from rm_gallery.training.optim import build_optimizer, build_schedule


def factors(total_steps: int, **options: Any) -> list[float]:
    schedule = build_schedule(OptimConfig(**options), total_steps)
    return [schedule(step) for step in range(total_steps)]


def test_cosine_starts_at_1_passes_the_middle_and_falls_to_its_floor() -> None:
    schedule = build_schedule(OptimConfig(lr_scheduler="cosine", min_lr_ratio=0.2), 10)
    assert schedule(0) == 1.0
    assert schedule(5) == pytest.approx(0.6)
    assert schedule(10) == pytest.approx(0.2)
    assert schedule(99) == pytest.approx(0.2)


def test_cosine_is_the_published_formula() -> None:
    for step, factor in enumerate(factors(7)):
        assert factor == pytest.approx((1 + math.cos(math.pi * step / 7)) / 2)


def test_wsd_is_flat_and_then_falls_straight() -> None:
    found = factors(10, lr_scheduler="wsd", decay_steps_ratio=0.4, min_lr_ratio=0.2)
    assert found[:7] == [1.0] * 7
    assert found[6:] == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_wsd_without_decay_is_constant() -> None:
    assert factors(5, lr_scheduler="wsd", decay_steps_ratio=0.0) == factors(5, lr_scheduler="constant") == [1.0] * 5


def test_warmup_rises_in_equal_steps_and_never_from_0() -> None:
    found = factors(10, lr_scheduler="constant", warmup_steps_ratio=0.4)
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1])


def test_after_warmup_the_cosine_has_the_steps_that_are_left() -> None:
    found = factors(12, warmup_steps_ratio=0.25)
    assert found[3:] == pytest.approx(factors(9))


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("total_steps", [1, 2, 3, 15, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 0.9])
def test_factors_lie_above_0_and_rise_only_in_warmup(name: str, total_steps: int, warmup: float) -> None:
    found = factors(total_steps, lr_scheduler=name, warmup_steps_ratio=warmup)
    peak = round(total_steps * warmup)
    assert all(0 < factor <= 1 for factor in found)
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)


def test_only_matrices_decay() -> None:
    layer = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    optimizer = build_optimizer(layer.named_parameters(), OptimConfig(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in layer.parameters()] == [0.1, 0.0, 0.0, 0.0]


def test_frozen_parameters_are_left_out() -> None:
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    optimizer = build_optimizer(layer.named_parameters(), OptimConfig())
    assert [p is layer.bias for group in optimizer.param_groups for p in group["params"]] == [True]


def test_the_optimizer_is_adamw_as_configured() -> None:
    config = OptimConfig(lr=0.1, betas=(0.5, 0.6), eps=1e-4, weight_decay=0.2)
    weight = nn.Parameter(torch.full((1, 1), 3.0))
    optimizer = build_optimizer([("weight", weight)], config)
    weight.grad = torch.full((1, 1), 2.0)
    optimizer.step()
    decayed = 3.0 * (1 - 0.1 * 0.2)
    assert weight.item() == pytest.approx(decayed - 0.1 * 2.0 / (2.0 + 1e-4))
