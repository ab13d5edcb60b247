"""`objective.lm_coefficient`: rewards as without it, and the language-model loss of preferred responses one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from rm_gallery.data.batching.bin_packing import Packer
from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.data.batching.prompt_sharing import plan_step
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.tokenization.token_group import Origin, Span, split_prefix
from rm_gallery.errors import UserError
from rm_gallery.modeling.language_loss import add_language_loss
from rm_gallery.modeling.reward_model import load_reward_model
from rm_gallery.schema import Comparison
from tests.small import make_model


def preferences() -> tuple[TokenData, list[tuple[np.ndarray, int]]]:
    """Pairs of one prompt and a ranking of four, and each preferred text with its first target, once per comparison."""
    draw = np.random.default_rng(0)
    prompt, found, wanted = draw.integers(8, 200, 20), [], []
    pool = [np.concatenate([prompt, draw.integers(8, 200, size)]) for size in (9, 4, 12, 7)]
    for number, (texts, pairs) in enumerate(
        [(pool[:2], [(0, 1)]), ([pool[0], pool[2]], [(0, 1)]), (pool, [(0, 1), (0, 2), (1, 2), (3, 2)])]
    ):
        spans = [Span(place, 20, len(texts[place])) for place in sorted({better for better, _ in pairs})]
        group = split_prefix(texts, [Comparison(*pair) for pair in pairs], spans=spans)
        found.append((group, Origin("a", number, prompt_hash=number // 2)))
        wanted += [(texts[better], 20) for better, _ in pairs]
    return TokenData.from_groups(found), wanted


@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("budget", [1000, pytest.param(70, marks=pytest.mark.slow)])
def test_losses_are_those_of_the_preferred_responses_one_by_one(tied: bool, budget: int, tmp_path: Path) -> None:
    folder = str(make_model("qwen2", tmp_path / "m", tie_word_embeddings=tied))
    torch.manual_seed(0)
    model = load_reward_model(folder).model.train()
    data, wanted = preferences()
    step = plan_step(data, np.arange(len(data)), Packer(budget))
    batches = [collate(step.load(data, pack)) for pack in step.packs[0]]
    rewards = [model(batch) for batch in batches]
    add_language_loss(model, folder, packing="auto")
    found = [model(batch) for batch in batches]
    for each, before in zip(found, rewards, strict=True):
        torch.testing.assert_close(each.rewards, before, atol=1e-5, rtol=1e-5)
    assert len(batches) == 1 if budget == 1000 else len(batches) > 1
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = torch.zeros(())
    for text, first in wanted:
        ids = torch.from_numpy(text)
        total = (
            total
            + F.cross_entropy(plain(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")[first - 1 :].sum()
        )
    assert step.num_targets == sum(len(text) - first for text, first in wanted)
    torch.testing.assert_close(sum(each.language.total for each in found), total, atol=1e-4, rtol=1e-6)
    # The gradient reaches the backbone as from the language model.
    sum(each.language.total for each in found).backward()
    total.backward()
    expected = dict(plain.named_parameters())
    for name, each in model.network.named_parameters():
        if name != "score.weight":
            torch.testing.assert_close(each.grad, expected[name].grad, atol=1e-3, rtol=1e-3, msg=name)
    empty = model(collate([]))
    assert len(empty.rewards) == 0 and empty.language.total.item() == 0


@pytest.mark.slow
def test_models_without_it_are_refused(tmp_path: Path) -> None:
    folder = str(make_model("bert", tmp_path / "bert"))
    with pytest.raises(UserError, match="bert is none: it attends in both directions"):
        add_language_loss(load_reward_model(folder).model, folder, packing="auto")
    folder = str(make_model("qwen2", tmp_path / "m", tie_word_embeddings=False))
    model = load_reward_model(folder).model
    model.network.save_pretrained(tmp_path / "rm")
    with pytest.raises(UserError, match="no output layer of a language model"):
        add_language_loss(model, str(tmp_path / "rm"), packing="auto")
