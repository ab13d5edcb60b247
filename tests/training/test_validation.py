"""Validation: the whole set, the same figures for any micro-batch, nothing changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.tokenization.token_group import Origin
from rm_gallery.modeling.reward_model import load_reward_model
from rm_gallery.objectives import bradley_terry
from rm_gallery.training.validation import validate
from tests.small import make_model, random_groups


def data(*seeds: int) -> TokenData:
    return TokenData.from_groups((group, Origin()) for seed in seeds for group in random_groups(seed))


@pytest.mark.parametrize("kind", ["qwen2", "bert"])
def test_figures_do_not_depend_on_the_micro_batch(kind: str, tmp_path: Path) -> None:
    model = load_reward_model(str(make_model(kind, tmp_path))).model
    found = [validate(model, data(0, 1, 2), bradley_terry, token_budget=budget) for budget in (400, 1000, 10**6)]
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-5)


def test_every_comparison_counts_once(qwen2_folder: Path) -> None:
    model = load_reward_model(str(qwen2_folder)).model
    groups = random_groups(0) + random_groups(1)
    with torch.no_grad():
        batch = collate(groups)
        rewards = model(batch)
    margins = rewards[batch.better] - rewards[batch.worse]
    found = validate(model, data(0, 1), bradley_terry, token_budget=500)
    assert found["val/loss"] == pytest.approx(torch.nn.functional.softplus(-margins).mean().item(), abs=1e-5)
    assert found["val/accuracy"] == pytest.approx((margins > 0).float().mean().item())
    assert found["val/margin"] == pytest.approx(margins.mean().item(), abs=1e-5)


def test_validation_changes_nothing(qwen2_folder: Path) -> None:
    model = load_reward_model(str(qwen2_folder)).model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    validate(model, data(0), bradley_terry, token_budget=500)
    assert model.training and torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
