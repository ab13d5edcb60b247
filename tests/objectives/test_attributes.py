"""The objective `attributes`: loss and gradient by hand, missing labels, the same sums for any micro-batches."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rm_gallery.data.batching.bin_packing import Packer
from rm_gallery.data.batching.loader import Phase, load_phases
from rm_gallery.data.batching.packed_batch import PackedBatch, collate
from rm_gallery.data.batching.plan import PackingConfig, Plan
from rm_gallery.data.batching.prompt_sharing import plan_step
from rm_gallery.data.formats.config import FormatConfig
from rm_gallery.data.formats.detect import choose_format
from rm_gallery.data.formats.labelled import rate_lists
from rm_gallery.data.sources import Row
from rm_gallery.data.token_cache.arrays import TokenData, make_chunk
from rm_gallery.data.token_cache.store import Facts, StoreWriter, open_store
from rm_gallery.data.tokenization.token_group import Origin, TokenGroup, split_prefix
from rm_gallery.errors import BadRow, Dropped
from rm_gallery.modeling.forward import pad_texts
from rm_gallery.objectives import build_objective
from rm_gallery.objectives.metrics import Sums
from rm_gallery.schema import Rating

NAMES = ("helpfulness", "verbosity")
OBJECTIVE = build_objective("attributes", NAMES)
NAN = math.nan


def rated_groups(count: int = 30) -> list[tuple[TokenGroup, Origin]]:
    """Groups of one to three responses; some have the same prompt, and some the same response with other labels."""
    draw, found = random.Random(0), []
    for number in range(count):
        prompt = [9] * 12 + [number % 4] * 8
        texts = [[*prompt, *(draw.randrange(3) for _ in range(draw.randint(1, 4)))] for _ in range(draw.randint(1, 3))]
        ratings = [
            Rating(place, attributes=(float(draw.randrange(5)), draw.choice([NAN, 1.0, 2.0])), weight=1.0 + place)
            for place in range(len(texts))
        ]
        found.append((split_prefix(texts, (), ratings), Origin(f"{number % 2}.parquet", number, "", number % 4)))
    return found


def outputs_of(batch: PackedBatch) -> torch.Tensor:
    """Stands for a model: two numbers that depend on the whole text alone."""
    texts = pad_texts(batch, 0)[0].double()[: len(batch.reward_index)]
    place = torch.arange(1, texts.shape[1] + 1)
    return torch.stack([(texts * place).sum(1) / 100, (texts * place.sqrt()).sum(1) / 50], 1).float()


def test_the_loss_and_its_gradient_are_those_of_the_formula() -> None:
    labels = [(2.0, NAN), (0.0, 1.0), (NAN, 4.0)]
    ratings = [Rating(place, attributes=each, weight=0.5 + place) for place, each in enumerate(labels)]
    tails = [np.array([place], np.int32) for place in range(3)]
    batch = collate([TokenGroup(np.zeros(0, np.int32), tails, (), ratings)])
    rewards = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    loss, sums = OBJECTIVE(rewards, batch)
    known = [
        (row, place, label) for row, each in enumerate(labels) for place, label in enumerate(each) if label == label
    ]
    by_hand = sum((0.5 + row) * (float(rewards.detach()[row, place]) - label) ** 2 for row, place, label in known)
    assert loss.item() == pytest.approx(by_hand)
    loss.backward()
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for row, place, label in known:
        expected[row, place] = 2 * (0.5 + row) * (rewards[row, place].detach() - label)
    assert rewards.grad is not None and torch.allclose(rewards.grad, expected)
    assert [float(sums[f"{name}:n"]) for name in NAMES] == [2, 2]
    assert torch.autograd.gradcheck(lambda values: OBJECTIVE.loss(values, batch), rewards)


def test_sums_do_not_depend_on_micro_batches_sharing_and_ranks() -> None:
    data = TokenData.from_groups(rated_groups())
    assert data.is_rated and data.num_comparisons == sum(len(group.tails) for group, _ in rated_groups())
    found, merged = [], 0
    for budget, ranks, share in ((10_000, 1, False), (60, 1, False), (150, 1, True), (400, 2, True)):
        step = plan_step(data, np.arange(len(data)), Packer(budget, ranks, attention_length=50), share_prompts=share)
        merged += sum(len(unit.parts) > 1 for unit in step.units)
        sums = Sums()
        for packs in step.packs:
            for pack in packs:
                batch = collate(step.load(data, pack))
                sums.add(OBJECTIVE(outputs_of(batch), batch)[1])
        metrics = OBJECTIVE.means(sums.read(), "val")
        found.append({**metrics, "count": step.num_comparisons})
    assert merged, "some groups of the same prompt were merged"
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)
    labels = [label for group, _ in rated_groups() for each in group.ratings for label in each.attributes]
    assert found[0]["count"] == sum(label == label for label in labels)


def test_metrics_are_those_of_numpy() -> None:
    groups = rated_groups()
    batch = collate([group for group, _ in groups])
    outputs = outputs_of(batch)
    found = OBJECTIVE.means({name: float(each) for name, each in OBJECTIVE(outputs, batch)[1].items()}, "val")
    rows = outputs.double().numpy()
    for place, name in enumerate(NAMES):
        labels = np.array([each.attributes[place] for group, _ in groups for each in group.ratings])
        known = ~np.isnan(labels)
        x, y = rows[known, place], labels[known]
        assert found[f"val/mse_{name}"] == pytest.approx(((x - y) ** 2).mean())
        assert found[f"val/pearson_{name}"] == pytest.approx(np.corrcoef(x, y)[0, 1])
        owner = np.repeat(np.arange(len(groups)), [len(group.ratings) for group, _ in groups])
        right = [
            rows[i, place] > rows[j, place]
            for i in range(len(labels)) for j in range(len(labels)) if owner[i] == owner[j] and labels[i] > labels[j]
        ]  # fmt: skip
        assert found[f"val/accuracy_{name}"] == pytest.approx(np.mean(right))


def test_an_empty_batch_has_a_gradient_of_zero() -> None:
    rewards = torch.zeros(0, 2, requires_grad=True)
    loss, sums = OBJECTIVE(rewards, collate([]))
    loss.backward()
    assert loss.item() == 0 and rewards.grad is not None
    assert sums.keys() == OBJECTIVE(torch.zeros(3, 2), collate([rated_groups()[0][0]]))[1].keys()
    assert OBJECTIVE.means({name: float(each) for name, each in sums.items()}, "val") == {}


def test_ratings_come_back_from_the_cache(tmp_path: Path) -> None:
    groups = rated_groups(6)
    with StoreWriter(tmp_path / "s") as writer:
        for each in groups:
            writer.append(make_chunk([each]))
        writer.finish(Facts("chat", False, [], 6, 0), Dropped({}, {}))
    store = open_store(tmp_path / "s")
    assert store is not None
    in_memory = TokenData.from_groups(groups)
    assert store.data.fingerprint() == in_memory.fingerprint()
    for index, (group, _) in enumerate(groups):
        assert repr(store.data[index].ratings) == repr(in_memory[index].ratings) == repr(list(group.ratings))
    other = [(TokenGroup(group.prefix, group.tails, (), group.ratings[:1]), origin) for group, origin in groups]
    assert TokenData.from_groups(other).fingerprint() != in_memory.fingerprint()


def test_regression_is_one_attribute_whose_output_is_the_reward() -> None:
    found = [
        replace(group, ratings=[replace(each, attributes=each.attributes[:1]) for each in group.ratings])
        for group, _ in rated_groups()
    ]
    batch = collate(found)
    rewards = outputs_of(batch)[:, 0]
    regression, attribute = build_objective("regression"), build_objective("attributes", NAMES[:1])
    loss, sums = regression(rewards, batch)
    assert loss.item() == attribute(rewards.unsqueeze(1), batch)[0].item()
    metrics = regression.means({name: float(each) for name, each in sums.items()}, "val")
    assert set(metrics) == {"val/loss", "val/mse", "val/pearson", "val/accuracy"}
    extreme = torch.full_like(rewards, 1e4).requires_grad_()
    regression(extreme, batch)[0].backward()
    assert extreme.grad is not None and torch.isfinite(extreme.grad).all()


def test_lists_of_responses_have_lists_of_numbers() -> None:
    config = FormatConfig(attributes=["scores"])
    values = {"prompt": "p", "responses": ["a", "b"], "scores": [3, None], "weight": 2.0}
    assert choose_format([Row(values, "a.jsonl", 0)], config).name == "scored"
    first, second = rate_lists(values, config, 2)
    assert first == Rating(0, attributes=(3.0,), weight=2.0) and math.isnan(second.attributes[0])
    with pytest.raises(BadRow, match="scores of a different length than the responses"):
        rate_lists({**values, "scores": [1]}, config, 2)


def scored(*scores: float, weight: float = 1.0) -> TokenGroup:
    tails = [np.array([place], np.int32) for place in range(len(scores))]
    ratings = [Rating(place, attributes=(score,), weight=weight) for place, score in enumerate(scores)]
    return TokenGroup(np.zeros(0, np.int32), tails, (), ratings)


def test_regression_then_bt_is_regression_and_then_bradley_terry_on_pairs() -> None:
    objective = build_objective("regression_then_bt", (), {"center_coefficient": 0.1, "bins": 0})
    batch = collate([scored(2, 3, math.nan, 3), scored(1, 1, 0, weight=2.0)])
    rewards = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    first, second = objective.phases
    plain = build_objective("regression", (), {"center_coefficient": 0.1})
    assert first(rewards, batch)[0].item() == pytest.approx(plain(rewards, batch)[0].item())
    r = rewards.tolist()
    expected = sum(weight * (math.log1p(math.exp(r[j] - r[i])) + 0.1 * (r[i] + r[j]) ** 2)
                   for i, j, weight in ((1, 0, 1), (3, 0, 1), (4, 6, 4), (5, 6, 4)))  # fmt: skip
    loss, sums = second(rewards, batch)
    assert loss.item() == pytest.approx(expected)
    found = second.means({name: float(each) for name, each in sums.items()}, "val")
    assert found["val/loss"] == pytest.approx(expected / 4) and found.keys() >= {"val/accuracy", "val/mse"}
    assert torch.autograd.gradcheck(lambda values: second.loss(values, batch), rewards)
    extreme = torch.tensor([1e4, -1e4, 0, 0, -1e4, 1e4, 0], requires_grad=True)
    second(extreme, batch)[0].backward()
    assert extreme.grad is not None and torch.isfinite(extreme.grad).all()


def test_pairs_are_counted_for_the_plan_and_groups_without_one_are_left_to_the_first_phase() -> None:
    groups = [scored(2, 3, math.nan, 3), scored(1), scored(0, 0), scored(3, 1, 3), scored(math.nan, 1), scored(1, 2, 3)]
    data = TokenData.from_groups((group, Origin("a", row)) for row, group in enumerate(groups))
    pairs = data.by_pairs()
    assert pairs.loss_counts.tolist() == [2, 0, 0, 2, 0, 3] and data.loss_counts.tolist() == [3, 1, 2, 3, 1, 3]
    plan = Plan(data.sizes, PackingConfig(train_batch_size=4, shuffle=False), Packer(100), seed=0)
    later = plan.of(pairs.sizes)
    assert [step.tolist() for step in later.epoch_steps(0)] == [[0, 3], [5]]
    phases = [Phase(data, plan, 3), Phase(pairs, later, 3)]
    whole = list(load_phases(phases))
    assert [step.phase for step in whole] == [0, 0, 0, 1, 1, 1] and [step.ends_phase for step in whole].count(True) == 2
    assert [step.num_comparisons for step in whole[3:]] == [4, 3, 4] and whole[3].num_pairs == 4
    assert [step.epoch for step in whole] == pytest.approx([0.2, 0.4, 0.6, 1.1, 1.6, 2.1])
    for start in range(7):
        tail = list(load_phases(phases, start_step=start))
        assert [(step.epoch, step.phase, step.num_comparisons) for step in tail] == [
            (step.epoch, step.phase, step.num_comparisons) for step in whole[start:]
        ]
