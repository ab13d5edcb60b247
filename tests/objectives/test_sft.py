"""Supervised fine-tuning: shared prompts, micro-batches and ranks do not change the loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from rm_gallery.data.batching.bin_packing import Packer
from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.data.batching.prompt_sharing import plan_step
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.tokenization.token_group import Origin, Span, TokenGroup, split_prefix
from rm_gallery.modeling.language_model import load_language_model
from rm_gallery.objectives import build_objective
from rm_gallery.schema import Rating
from tests.small import make_model


def test_targets_of_a_shared_prefix_count_once_per_text() -> None:
    """The example of `_targets`."""
    a, b, c, d = 11, 12, 13, 14
    group = split_prefix([[a, b, c], [a, b, d]], (), spans=[Span(0, 1, 3), Span(1, 1, 3)])
    batch = collate([TokenGroup(np.zeros(0, np.int32), [np.array([a], np.int32)], ()), group])
    pairs = zip(batch.target_source.tolist(), batch.target_token.tolist(), batch.target_weight.tolist(), strict=True)
    assert list(pairs) == [(1, b, 2.0), (2, c, 1.0), (2, d, 1.0)]


def test_weights_of_texts_add_up_and_leave_the_counts_as_they_are() -> None:
    a, b, c = 11, 12, 13
    spans = [Span(0, 1, 3, weight=0.5), Span(0, 1, 3, weight=2.0), Span(1, 1, 2, weight=0.0)]
    batch = collate([split_prefix([[a, b, c], [a, b, b]], (), spans=spans)])
    assert (batch.target_token.tolist(), batch.target_weight.tolist()) == ([b, c], [2.5, 2.5])
    assert (batch.target_times.tolist(), batch.target_texts.tolist()) == ([3.0, 2.0], [2.0, 1.0])


def conversations(weights: Sequence[float]) -> TokenData:
    """Ten conversations: five begin with one prompt, two of them are equal."""
    draw = np.random.default_rng(0)
    prompt, found = draw.integers(8, 200, 30), []
    answers = [draw.integers(8, 200, size) for size in (9, 4, 12, 7)]
    texts = [np.concatenate([prompt, answers[place]]) for place in (0, 1, 2, 3, 3)]
    texts += [draw.integers(8, 200, size) for size in (50, 40, 12, 35, 22)]
    for number, text in enumerate(texts):
        spans = [Span(0, 5, 9), Span(0, min(30, len(text) - 2), len(text))]
        group = split_prefix([text], (), [Rating(0, weight=weights[number])], spans=spans)
        found.append((group, Origin("a", number, prompt_hash=0 if number < 5 else number)))
    return TokenData.from_groups(found, "chat")


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("budget", [120, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_loss_of_a_step_is_that_of_its_conversations_one_by_one(budget: int, ranks: int, tmp_path: Path) -> None:
    model = load_language_model(str(make_model("qwen2", tmp_path / "m"))).model
    weights = [1.0, 0.5, 3.0, 2.0, 0.25, 0.0, 1.0, 7.0, 1.5, 1.0]
    data, objective = conversations(weights), build_objective("sft")
    groups = np.arange(len(data))
    sums: dict[bool, dict[str, float]] = {}
    with torch.no_grad():
        for shares in (False, True):
            step = plan_step(data, groups, Packer(budget, ranks), share_prompts=shares)
            packs = [pack for packs in step.packs for pack in packs]
            batches = [collate(step.load(data, pack)) for pack in packs]
            found = [objective(model(batch), batch) for batch in batches]
            sums[shares] = {name: sum(float(each[1][name]) for each in found) for name in found[0][1]}
            tokens = sum(batch.num_tokens for batch in batches)
            assert step.num_comparisons == step.num_targets == sum(int(b.target_times.sum()) for b in batches)
            assert (tokens < data.num_tokens) is shares
        alone = [collate([data[index]]) for index in range(len(data))]
        apart = [float(model(batch).each.double().sum()) for batch in alone]
        wanted = sum(weight * loss for weight, loss in zip(weights, apart, strict=True))
    for each in sums.values():
        assert each["loss"] == pytest.approx(wanted, rel=1e-6)
        assert (each["tokens"], each["correct"]) == (step.num_targets, sums[False]["correct"])
    metrics = objective.means(sums[True], "val")
    assert metrics["val/loss"] == pytest.approx(wanted / step.num_targets)
    assert metrics["val/perplexity"] == pytest.approx(np.exp(sum(apart) / step.num_targets)), "of all tokens alike"
